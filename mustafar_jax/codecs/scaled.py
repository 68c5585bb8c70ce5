"""Codes of a few bits, which stand for levels times one scale a row."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.codecs.codec import Codec


class ScaledCodec(Codec):
    """Codes that stand for level * scale, exactly, in float32, with one bfloat16 scale a row.

    A level has at most 8 significant bits, as a scale has, so their product is exact. bfloat16 serves caches of every
    dtype: float16 has not the range of a rotated row's scale.

    The scale is the best of a few: for each of `fractions`, the largest magnitude times it is put on the top level,
    entries go to their nearest levels, and the scale is refitted to these by least squares and rounded. Entries then go
    to the levels nearest under the rounded scale. The one of least (weighted) squared error is taken. All of it is in
    float32. So entries beyond the top level are cut where that serves the others.

    A row that holds a NaN or an infinity has a scale that is not finite, and no other row has. A row of zeros has scale
    0.
    """

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """See `Codec`."""

    @property
    @abc.abstractmethod
    def top(self) -> float:
        """The largest level."""

    @property
    @abc.abstractmethod
    def fractions(self) -> tuple[float, ...]:
        """Of the largest magnitude: see above. More of them lessen the error by a hundredth (docs/quality.md)."""

    @abc.abstractmethod
    def nearest(self, ratio: jax.Array) -> jax.Array:
        """The uint8 codes of the levels that are nearest to float32 entries over their scale."""

    @abc.abstractmethod
    def level(self, codes: jax.Array) -> jax.Array:
        """The float32 levels of codes."""

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """See `Codec`."""
        return np.dtype(np.float32)

    def encode(
        self, x: jax.Array, dtype: np.dtype[Any], held: jax.Array | None = None, weight: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `Codec`."""
        exact = x.astype(jnp.float32)
        exact = exact if held is None else jnp.where(held, exact, 0)
        counts = jnp.float32(1) if weight is None else weight**2
        counts = jnp.broadcast_to(counts if held is None else jnp.where(held, counts, 0), exact.shape)
        is_finite = jnp.isfinite(exact)
        exact = jnp.where(is_finite, exact, 0)
        _, exponent = jnp.frexp(jnp.max(jnp.abs(exact), axis=-1))
        codes, scale = self._fit(jnp.ldexp(exact, -exponent[..., None]), counts)
        scale = jnp.minimum(jnp.ldexp(scale, exponent), self._largest_scale)
        return codes, jnp.where(is_finite.all(axis=-1), scale, jnp.nan).astype(jnp.bfloat16)

    def _fit(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes and rounded scales, as float32, of rows whose largest magnitude is 0 or from 1/2 up to 1."""
        largest = jnp.max(jnp.abs(x), axis=-1)
        trials = [self._refit(x, counts, largest * (fraction / self.top)) for fraction in self.fractions]
        codes, scale, error = trials[0]
        for other_codes, other_scale, other_error in trials[1:]:
            better = other_error < error
            codes = jnp.where(better[..., None], other_codes, codes)
            scale, error = jnp.where(better, other_scale, scale), jnp.where(better, other_error, error)
        return codes, scale

    def _refit(self, x: jax.Array, counts: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Codes, their scale, and their weighted squared error, found from a first scale."""
        level = self.level(self.nearest(_over(x, start)))
        total = jnp.sum(counts * level**2, axis=-1)
        scale = jnp.sum(counts * x * level, axis=-1) / jnp.where(total > 0, total, 1)
        scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
        codes = self.nearest(_over(x, scale))
        error = jnp.sum(counts * (x - self.level(codes) * scale[..., None]) ** 2, axis=-1)
        return codes, scale, error

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Codec`."""
        assert scale is not None
        return self.level(codes) * scale.astype(jnp.float32)[..., None]

    @property
    def _largest_scale(self) -> float:
        """The largest of bfloat16 with which no level is beyond float32."""
        largest = np.float32(np.finfo(np.float32).max / self.top)
        return float((largest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))  # bfloat16 is its upper half


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Entries [..., n] over their rows' scales [...], or as they are where that is 0."""
    return x / jnp.where(scale > 0, scale, 1)[..., None]
