"""The model's description in the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.fields import is_token
from mustafar_jax.models.rope import RopeScaling, frequencies

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that divides the rotary frequencies one by one."""

# Control tokens that end a text or a turn. Many files name one end token alone, though the model ends with several.
_ENDS = frozenset({"<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"})
_CONTROL_TOKEN = 3

# Keys that llama.cpp computes with in this or a kindred architecture, and the values at which they change nothing.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "use_parallel_residual": (False,),
}


def read_gguf_config(
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
) -> ModelConfig:
    """The model's description that a GGUF file's metadata and tensors give.

    Args:
        architecture: what the keys of the description begin with.
        metadata: by key.
        shapes: of the file's tensors, by GGUF name, outermost axis first.
        rope_factors: the tensor `ROPE_FACTORS`, or None where the file has none.

    Raises:
        ValueError: metadata that are missing, contradict themselves or are out of range, and what no model here
            computes.
    """
    keys = _Keys(architecture, metadata)
    keys.check_supported()
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    num_layers = keys.integer("block_count")
    intermediate_size = keys.integer("feed_forward_length")
    max_position_embeddings = keys.integer("context_length")
    rms_norm_eps = keys.number("attention.layer_norm_rms_epsilon")
    keys.check_missing()
    rope_theta = keys.number("rope.freq_base", 10000.0)
    head_dim = _head_dim(keys, hidden_size, num_heads)
    vocab_size = _vocab_size(shapes)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=rms_norm_eps,
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(keys, rope_factors, rope_theta, head_dim),
        sliding_window=keys.integer("attention.sliding_window", 0) or None,
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        attention_output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        eos_ids=_eos_ids(metadata, vocab_size),
    )


class _Keys:
    """The metadata under an architecture; a missing key counts as 0 until `check_missing` reports all at once."""

    def __init__(self, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.architecture, self.metadata = architecture, metadata
        self.missing: list[str] = []

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{self.architecture}.{key} {message}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            self.missing.append(f"{self.architecture}.{key}")
            return 0
        if isinstance(value, list):  # one number for each layer
            if len(set(value)) != 1:
                raise self.error(key, f"differs between layers ({value}); one value for all is supported")
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"is {value!r}, it must be an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"is {value!r}, it must be a number")
        # The shortest decimal of the stored float32, which is what the model's own configuration says: 1e-05.
        return float(str(np.float32(value)))

    def check_supported(self) -> None:
        for key, supported in _ONLY.items():
            if (value := self.metadata.get(f"{self.architecture}.{key}", supported[0])) not in supported:
                raise self.error(key, f"is {value!r}, supported: {', '.join(map(repr, supported))}")

    def check_missing(self) -> None:
        if self.missing:
            raise ValueError(f"metadata are missing: {', '.join(self.missing)}")


def _head_dim(keys: _Keys, hidden_size: int, num_heads: int) -> int:
    if num_heads <= 0:
        raise keys.error("attention.head_count", f"is {num_heads}, it must be positive")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = keys.integer(key, head_dim)
        if value != head_dim:
            raise keys.error(key, f"is {value}, it must be the head_dim, {head_dim}")
    return head_dim


def _vocab_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The embedding's rows, which some files pad beyond the tokens that their metadata counts."""
    if "token_embd.weight" not in shapes:
        raise ValueError("the tensor 'token_embd.weight' is missing")
    return shapes["token_embd.weight"][0]


def _eos_ids(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text, a turn or a message, as named by id or by their well-known text.

    Ids that no token has, such as -1 in 32 bits, are how some files say that there is none.
    """
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    ids += [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL_TOKEN and token in _ENDS
    ]
    return tuple(dict.fromkeys(index for index in ids if is_token(index) and index < vocab_size))


def _rope_scaling(keys: _Keys, factors: np.ndarray | None, rope_theta: float, head_dim: int) -> RopeScaling | None:
    linear = _linear_scaling(keys)
    if factors is None:
        return linear
    if linear is not None:
        raise ValueError(f"linear RoPE scaling and {ROPE_FACTORS!r} are both there; one at a time is supported")
    scaling = _llama3_scaling(factors, rope_theta, head_dim)
    if scaling is None:
        raise ValueError(
            f"the frequency factors in {ROPE_FACTORS!r} are not those of Llama 3 (low_freq_factor 1, "
            "high_freq_factor 4, original context 8192); no others are supported"
        )
    return None if scaling.factor == 1 else scaling


def _llama3_scaling(divisors: np.ndarray, rope_theta: float, head_dim: int) -> RopeScaling | None:
    """The scaling that divides the frequencies by `divisors` [head_dim / 2]; None where Llama 3's does not."""
    if not np.isfinite(divisors).all() or divisors.shape != (head_dim // 2,):
        return None
    # The lowest frequency is divided by the whole factor, and factors are round numbers.
    scaling = RopeScaling("llama3", float(f"{max(1.0, divisors.max()):.5g}"))
    expected = frequencies(rope_theta, head_dim, None) / frequencies(rope_theta, head_dim, scaling)
    return scaling if np.allclose(divisors.astype(np.float64), expected, rtol=1e-4, atol=0) else None


def _linear_scaling(keys: _Keys) -> RopeScaling | None:
    # Files from before 2024 say `scale_linear`; a factor without a type is a linear one.
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0)
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise keys.error("rope.scaling.type", f"is {kind!r}; supported are 'none' and 'linear'")
    return RopeScaling("linear", factor) if kind == "linear" and factor not in (0.0, 1.0) else None
