"""Levels at equal distances."""

import dataclasses

import jax
import jax.numpy as jnp

from mustafar_jax.codecs.scaled import ScaledCodec

_FRACTIONS = {8: (1.0,), 4: (0.75, 0.85, 0.95), 3: (0.65, 0.75, 0.9), 2: (0.45, 0.55, 0.7)}


@dataclasses.dataclass(frozen=True)
class Uniform(ScaledCodec):
    """Codes u of `width` bits, 2, 3, 4 or 8, stand for u - (2**width - 1) / 2 times the scale.

    These levels, halves of odd numbers, are half of them positive. On rows that were rotated, whose entries are nearly
    normal, they lose no more than the levels that are best for a normal distribution (docs/quality.md).
    """

    width: int

    @property
    def name(self) -> str:
        """See `Codec`."""
        return f"codes of {self.bits} bits"

    @property
    def bits(self) -> int:
        """See `Codec`."""
        return self.width

    @property
    def fractions(self) -> tuple[float, ...]:
        """See `ScaledCodec`."""
        return _FRACTIONS[self.width]

    @property
    def top(self) -> float:
        """See `ScaledCodec`."""
        return (2**self.bits - 1) / 2

    def nearest(self, ratio: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        return jnp.minimum(jnp.floor(ratio) + 0.5, self.top)

    def code(self, level: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        return (level + self.top).astype(jnp.int32)

    def level(self, codes: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        return codes.astype(jnp.float32) - self.top
