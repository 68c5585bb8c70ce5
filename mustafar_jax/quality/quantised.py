"""Quantised caches, by simulation: an honest neighbour of pruned ones in the same tables.

What leaves the dense window is rounded to a few bits in groups of 32: keys per channel, along 32 tokens, values per
token, along 32 channels (as KIVI does, arXiv 2402.02750). Held are the rounded numbers as ordinary ones; `nbytes`
counts what the bits, scales and offsets would take.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.codecs import Codec
from mustafar_jax.config import CompressionConfig
from mustafar_jax.rows import RowFormat

GROUP = 32
"""Numbers that share a scale and an offset, of 16 bits each."""


@dataclasses.dataclass(frozen=True)
class Rounded(Codec):
    """Numbers rounded to `width` bits, in groups of 32 along channels or along tokens."""

    width: int
    along: Literal["channels", "tokens"]

    @property
    def name(self) -> str:
        """See `Codec`."""
        return f"simulated codes of {self.width} bits"

    @property
    def bits(self) -> None:
        """See `Codec`: rounded numbers are held as ordinary ones."""
        return None

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """See `Codec`."""
        return dtype

    def encode(
        self, x: jax.Array, dtype: np.dtype[Any], held: jax.Array | None = None, weight: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """See `Codec`."""
        if self.along == "channels":
            return quantise(x, self.width).astype(dtype), None
        return quantise(x.swapaxes(-2, -1), self.width).swapaxes(-2, -1).astype(dtype), None

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Codec`."""
        return codes

    def nbytes(self, held: int, entries: int) -> int:
        """Bytes of `width` bits per number, and 4 for each group's scale and offset."""
        return entries * self.width // 8 + entries // GROUP * 4


@dataclasses.dataclass(frozen=True)
class Quantised(CompressionConfig):
    """A config that prunes nothing and rounds what leaves the dense window to `bits` per number."""

    k_sparsity: float = 0.0
    v_sparsity: float = 0.0
    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in range(1, 9):
            raise ValueError(f"bits={self.bits!r} must be an integer in 1 .. 8")
        for name, only in (("k_sparsity", 0), ("v_sparsity", 0), ("k_bits", 16), ("v_bits", 16)):
            if getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)} must be {only}: `bits` says what is rounded")

    @property
    def is_dense(self) -> bool:
        """It is not: see `CompressionConfig.is_dense`."""
        return False

    @property
    def compresses_keys(self) -> bool:
        """Whether keys are pruned or coded."""
        return True

    def formats(self, head_dim: int, dtype: np.dtype[Any]) -> tuple[RowFormat, RowFormat]:
        """How packed keys and packed values of this dtype are stored."""
        if head_dim % GROUP:
            raise ValueError(f"{head_dim=} must be a multiple of {GROUP} where numbers are rounded in groups of it")
        return (
            RowFormat(head_dim, dtype, codec=Rounded(self.bits, "tokens")),
            RowFormat(head_dim, dtype, codec=Rounded(self.bits, "channels")),
        )


def quantise(x: jax.Array, bits: int) -> jax.Array:
    """Round [..., n] to 2**bits levels between the least and the largest of each 32 numbers; n a multiple of 32."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    least, largest = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    least, scale = (y.astype(jnp.float16).astype(jnp.float32) for y in (least, (largest - least) / (2**bits - 1)))
    level = jnp.clip(jnp.round((groups - least) / jnp.where(scale > 0, scale, 1)), 0, 2**bits - 1)
    return (least + level * scale).reshape(x.shape).astype(x.dtype)
