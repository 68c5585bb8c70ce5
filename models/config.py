"""The shape of a decoder-only transformer, whatever file states it."""

import dataclasses
import functools

import numpy as np

from mustafar_jax.models import rope
from mustafar_jax.models.fields import (
    A_LENGTH,
    A_SIZE,
    is_above_zero,
    is_at_least_zero,
    is_flag,
    is_length,
    is_size,
    is_token,
)
from mustafar_jax.models.rope import RopeScaling

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "attention_output_bias", "qk_norm", "mlp_bias")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model's static description, of any family; hashable, so it can be static under `jax.jit`.

    `attention_bias` is of q, k and v, `attention_output_bias` of the projection after attention. With `qk_norm` every
    head's query and key pass an RMSNorm over their channels before they are rotated.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = rope.DEFAULT_THETA
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            self._check(name, is_size(getattr(self, name)), A_SIZE)
        self._check("max_position_embeddings", is_length(self.max_position_embeddings), A_LENGTH)
        self._check("rms_norm_eps", is_at_least_zero(self.rms_norm_eps), "a number of at least 0")
        self._check("rope_theta", is_above_zero(self.rope_theta), "a number above 0")
        for name in _FLAGS:
            self._check(name, is_flag(getattr(self, name)), "True or False")
        self._check("eos_ids", all(map(is_token, self.eos_ids)), "integers from 0 to 2**31 - 1")
        window = self.sliding_window
        self._check("sliding_window", window is None or is_size(window), f"{A_SIZE}, or None")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of channels")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")


@functools.lru_cache
def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """The rotary frequencies of a model: read-only float32 [head_dim / 2], radians per position."""
    result = rope.frequencies(config.rope_theta, config.head_dim, config.rope_scaling).astype(np.float32)
    result.setflags(write=False)
    return result
