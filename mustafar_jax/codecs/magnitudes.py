"""Levels for what pruning keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.codecs.scaled import ScaledCodec

MAGNITUDES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Small numbers of floating point with one bit of mantissa: (code + 1) << 9 are their bits in float16, times 2**14."""

_LEVELS = np.array([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], np.float32)
_MANTISSA = 22
"""The place of the highest bit of a float32's mantissa, the one that levels have."""
_BELOW = (1 << _MANTISSA) - 1
_BEFORE_ONE = int(np.float32(0.75).view(np.int32)) >> _MANTISSA


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
        # from 1 on a level is what one bit of mantissa holds, what lies between two going to the smaller one
        bits = lax.bitcast_convert_type(ratio, jnp.int32)
        rounded = lax.bitcast_convert_type((bits + (_BELOW >> 1)) & ~_BELOW, jnp.float32)
        return jnp.where(ratio > 0.75, jnp.clip(rounded, 1, self.top), 0.5)

    def code(self, level: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        steps = lax.bitcast_convert_type(jnp.abs(level), jnp.int32) >> _MANTISSA
        return jnp.maximum(steps - _BEFORE_ONE, 0) + 8 * (level < 0).astype(jnp.int32)

    def level(self, codes: jax.Array) -> jax.Array:
        """See `ScaledCodec`."""
        return jnp.take(_LEVELS, codes, mode="clip")
