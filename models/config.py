"""The shape of a decoder-only transformer, as its checkpoint states it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

_ROPE_KINDS = ("default", "linear", "llama3")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    `kind` is "linear" (every frequency divided by `factor`) or "llama3" (Llama 3.1: only the low frequencies are,
    with a smooth passage between the two wavelengths that the other fields set).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind={self.kind!r} is not a known rope scaling: linear or llama3 is wanted")
        if not self.factor > 0:
            raise ValueError(f"factor={self.factor!r} must be above 0")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor!r} must be below high_freq_factor={self.high_freq_factor!r}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama- or Mistral-type model's static description; hashable, so it can be static under `jax.jit`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_position_embeddings"):
            _check_positive(name, getattr(self, name))
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of channels")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.sliding_window is not None:
            _check_positive("sliding_window", self.sliding_window)

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Read the fields of a `config.json` that Llama and Mistral share.

        Both spellings are read: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of transformers 5.
        Fields that a file leaves out have the values that transformers' LlamaConfig gives them.

        Args:
            fields: the content of config.json.
            generation: the content of generation_config.json; its stop tokens win over those of config.json.

        Returns:
            The model's description, without a sliding window.

        Raises:
            ValueError: for what no model here computes, naming every such field, what it holds and what is supported.
        """
        if problems := _unsupported(fields):
            raise ValueError("config.json describes a model that is not supported: " + "; ".join(problems))
        heads = fields["num_attention_heads"]
        theta, scaling = _read_rope(fields)
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=_value(fields, "num_key_value_heads", heads),
            head_dim=_value(fields, "head_dim", fields["hidden_size"] // heads),
            max_position_embeddings=_value(fields, "max_position_embeddings", 2048),
            rms_norm_eps=_value(fields, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_value(fields, "tie_word_embeddings", False),
            attention_bias=_value(fields, "attention_bias", False),
            mlp_bias=_value(fields, "mlp_bias", False),
            eos_ids=_read_eos_ids(fields, generation or {}),
        )


@functools.lru_cache
def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """The rotary frequencies of a model: read-only float32 [head_dim / 2], radians per position."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        kept = 0.0 if scaling.kind == "linear" else _llama3_kept_share(frequencies, scaling)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    result = frequencies.astype(np.float32)
    result.setflags(write=False)
    return result


def _llama3_kept_share(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency is not scaled: 0 for those that turn rarely in the original context, 1 for others."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    return np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_positive(name: str, value: object) -> None:
    if not _is_positive(value):
        raise ValueError(f"{name}={value!r} must be a positive integer")


def _value(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field, or its default where the file leaves it out or says null."""
    value = fields.get(name)
    return default if value is None else value


def _unsupported(fields: Mapping[str, Any]) -> list[str]:
    problems = [f"{name} is missing" for name in _REQUIRED if fields.get(name) is None]
    for name in _REQUIRED:
        value = fields.get(name)
        if value is not None and not _is_positive(value):
            problems.append(f"{name}={value!r} must be a positive integer")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(_value(fields, name, {}), Mapping):
            return [*problems, f"{name}={fields[name]!r} must be an object"]
    activation = _value(fields, "hidden_act", "silu")
    if activation != "silu":
        problems.append(f"hidden_act={activation!r}, supported: 'silu'")
    rope = _rope_fields(fields)
    kind = rope.get("rope_type")
    if kind not in _ROPE_KINDS:
        problems.append(f"rope_type={kind!r}, supported: {', '.join(map(repr, _ROPE_KINDS))}")
    elif kind != "default" and "factor" not in rope:
        problems.append(f"factor is missing beside rope_type={kind!r}")
    share = _value(rope, "partial_rotary_factor", _value(fields, "partial_rotary_factor", 1.0))
    if share != 1.0:
        problems.append(f"partial_rotary_factor={share!r}, supported: 1.0")
    layer_types = _value(fields, "layer_types", [])
    if len(set(layer_types)) > 1:
        problems.append(f"layer_types={sorted(set(layer_types))}, supported: the same for all layers")
    if fields.get("quantization_config") is not None:
        problems.append("quantization_config is present, supported: bfloat16, float16 and float32 weights")
    return problems


def _rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's fields in transformers 5's spelling, whichever the file uses."""
    rope = {**_value(fields, "rope_scaling", {}), **_value(fields, "rope_parameters", {})}
    rope["rope_type"] = _value(rope, "rope_type", _value(rope, "type", "default"))
    rope["rope_theta"] = _value(rope, "rope_theta", _value(fields, "rope_theta", 10000.0))
    return rope


def _read_rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = _rope_fields(fields)
    theta = float(rope["rope_theta"])
    if rope["rope_type"] == "default":
        return theta, None
    if rope["rope_type"] == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    original = _value(fields, "max_position_embeddings", 2048)
    return theta, RopeScaling(
        "llama3",
        float(rope["factor"]),
        low_freq_factor=float(_value(rope, "low_freq_factor", RopeScaling.low_freq_factor)),
        high_freq_factor=float(_value(rope, "high_freq_factor", RopeScaling.high_freq_factor)),
        original_max_position_embeddings=_value(rope, "original_max_position_embeddings", original),
    )


def _read_eos_ids(fields: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = _value(generation, "eos_token_id", _value(fields, "eos_token_id", ()))
    return (ids,) if isinstance(ids, int) else tuple(ids)
