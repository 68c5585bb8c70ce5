"""Codes of 8 bits, with one scale a row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.codecs.codec import Codec

_MIDDLE = 0.5
"""Levels are code + 1/2, which makes as many of them positive as negative."""

_LARGEST = 127 + _MIDDLE

_LARGEST_SCALE = 2.0**121
"""Of this scale, no level is beyond float32."""


@dataclasses.dataclass(frozen=True)
class EightBits(Codec):
    """int8 codes n, which stand for (n + 1/2) * scale, exactly, in float32; one bfloat16 scale a row.

    The scale puts the row's largest magnitude on the last level. An entry is off by at most half a step, a 255th of
    that magnitude, but for the scale's rounding. A row that holds a NaN or an infinity has a scale that is not finite,
    and no other row does. A row of zeros has scale 0.
    """

    @property
    def name(self) -> str:
        """See `Codec`."""
        return "codes of 8 bits"

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """See `Codec`."""
        return np.dtype(np.float32)

    def encode(self, entries: jax.Array, dtype: np.dtype[Any]) -> tuple[jax.Array, jax.Array]:
        """See `Codec`."""
        exact = entries.astype(jnp.float32)
        is_finite = jnp.isfinite(exact)
        largest = jnp.max(jnp.abs(exact), axis=-1, initial=0, where=is_finite)
        scale = jnp.minimum(largest / _LARGEST, _LARGEST_SCALE)
        scale = jnp.where(is_finite.all(axis=-1), scale, jnp.nan).astype(jnp.bfloat16)
        step = scale.astype(jnp.float32)[..., None]
        usable = step > 0
        level = jnp.floor(exact / jnp.where(usable, step, 1))
        codes = jnp.where(usable, jnp.clip(level, -128, 127), 0)
        return codes.astype(jnp.int8), scale

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Codec`."""
        assert scale is not None
        return (codes.astype(jnp.float32) + _MIDDLE) * scale.astype(jnp.float32)[..., None]
