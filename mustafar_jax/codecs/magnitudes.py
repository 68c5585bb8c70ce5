"""Levels for what pruning keeps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.codecs.scaled import ScaledCodec

MAGNITUDES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Small numbers of floating point with one bit of mantissa: (code + 1) << 9 are their bits in float16, times 2**14."""

_LEVELS = np.array([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], np.float32)
_BETWEEN = tuple((low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES))


@dataclasses.dataclass(frozen=True)
class SignMagnitude(ScaledCodec):
    """Codes of 4 bits: the sign (set: negative) above three bits that name one of `MAGNITUDES`, times the scale.

    What pruning keeps of a row lies on both sides of a gap, and reaches far: levels that grow with the magnitude fit it
    better than equal steps.
    """

    @property
    def name(self) -> str:
        """See `Codec`."""
        return "signs and magnitudes of 4 bits"

    @property
    def bits(self) -> int:
        """See `Codec`."""
        return 4

    @property
    def fractions(self) -> tuple[float, ...]:
        """See `ScaledCodec`."""
        return 0.65, 0.8, 0.95

    @property
    def top(self) -> float:
        """See `ScaledCodec`."""
        return MAGNITUDES[-1]

    def nearest(self, ratio: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        steps = zip(_BETWEEN, itertools.pairwise(MAGNITUDES), strict=True)
        above = [jnp.where(jnp.abs(ratio) > edge, high - low, 0.0) for edge, (low, high) in steps]
        magnitude = sum(above, jnp.float32(MAGNITUDES[0]))
        return jnp.where(ratio < 0, -magnitude, magnitude)

    def code(self, level: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        above = [(jnp.abs(level) > edge).astype(jnp.int32) for edge in _BETWEEN]
        return sum(above, 8 * (level < 0).astype(jnp.int32))

    def level(self, codes: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        return jnp.take(_LEVELS, codes, mode="clip")
