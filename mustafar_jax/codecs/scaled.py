"""Codes of a few bits, which stand for levels times one scale a row."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.codecs.codec import Codec


class ScaledCodec(Codec):
    """Codes that stand for level * scale, exactly, in float32, with one bfloat16 scale a row.

    A level has at most 8 significant bits, as a scale has, so their product is exact. bfloat16 serves caches of every
    dtype: float16 has not the range of a rotated row's scale.

    A row's codes are the best of a few. For each of `fractions`, the largest magnitude times it is put on the top
    level, entries go to their nearest levels, the scale is refitted to these by least squares, and entries go to the
    levels nearest under that. Those codes are taken whose levels point most nearly where the row does, by the
    (weighted) cosine. All of it is in float32.

    The scale then keeps the row's length along itself: what the codes stand for has the row's own product with it. The
    scale of least squares would shorten every row by its share of error, and what attention sums over many tokens
    loses that share, while other errors cancel (docs/quality.md). Rows that levels fit badly, more than half of whose
    energy would be error, are kept at twice the scale of least squares.

    A row that holds a NaN or an infinity has a scale that is not finite, and no other row has. A row of zeros has scale
    0; so may one whose scale would be below bfloat16's least ordinary number, 1e-38.
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
        """The magnitudes of the levels that are nearest to those of entries over their scale, all float32.

        Levels are symmetric: an entry's level has its sign, which finding it can leave aside.
        """

    @abc.abstractmethod
    def code(self, level: jax.Array) -> jax.Array:
        """The int32 codes of levels, which have their signs."""

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
        levels, scale = self.fit(jnp.where(is_finite, exact, 0), counts)
        scale = jnp.where(is_finite.all(axis=-1), scale, jnp.nan).astype(jnp.bfloat16)
        return self.code(levels).astype(jnp.uint8), scale

    def fit(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Levels [..., n] and scales [...] of rows; what XLA and the kernels share.

        Args:
            x: float32 [..., n], finite.
            counts: float32, broadcasts against x: how much the square of an entry's error counts.
        """
        largest = jnp.max(jnp.abs(x), axis=-1)
        grow = _power_of_two(largest)
        largest, x = largest * grow, x * grow[..., None]
        size = jnp.abs(x)
        best = self._best(size, counts, largest)
        energy = jnp.sum(counts * size**2, axis=-1)
        along_itself = energy / jnp.where(best.product > 0, best.product, 1)
        scale = jnp.minimum(along_itself, 2 * best.least_squares) / grow
        level = self.nearest(_over(size, best.step))
        return jnp.where(x < 0, -level, level), jnp.minimum(scale, self._largest_scale)

    def _best(self, size: jax.Array, counts: jax.Array, largest: jax.Array) -> "_Trial":
        """The trial whose levels point most nearly where the row does; the first of those that are level.

        A loop, not one trial after the other: the code of a GPU kernel would outgrow its cache (docs/kernels.md).
        """
        starts = [jnp.float32(fraction / self.top) for fraction in self.fractions]
        if len(starts) == 1:
            return self._trial(size, counts, largest * starts[0])

        def better(i: jax.Array, best: _Trial) -> _Trial:
            start = starts[0]
            for j, other in enumerate(starts[1:], start=1):
                start = jnp.where(i == j, other, start)
            trial = self._trial(size, counts, largest * start)
            is_better = trial.fit > best.fit
            return _Trial(*(jnp.where(is_better, y, x) for x, y in zip(best, trial, strict=True)))

        zero = jnp.zeros_like(largest)
        return lax.fori_loop(0, len(starts), better, _Trial(zero, zero, zero, fit=zero - 1))

    def _trial(self, size: jax.Array, counts: jax.Array, start: jax.Array) -> "_Trial":
        """Levels found from a first scale, for the magnitudes of entries."""
        _, step = _product(size, self.nearest(_over(size, start)), counts)
        product, least_squares = _product(size, self.nearest(_over(size, step)), counts)
        return _Trial(step, product, least_squares, fit=product * least_squares)

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Codec`."""
        assert scale is not None
        return self.level(codes) * scale.astype(jnp.float32)[..., None]

    @property
    def _largest_scale(self) -> float:
        """The largest of bfloat16 with which no level is beyond float32."""
        largest = np.float32(np.finfo(np.float32).max / self.top)
        return float((largest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))  # bfloat16 is its upper half


class _Trial(NamedTuple):
    """Levels of rows [..., n].

    Attributes:
        step: [...], the scale under which these levels are the nearest ones.
        product: [...], of rows and levels, weighted.
        least_squares: [...], the scale of least squared error.
        fit: [...], the squared cosine of rows and levels, times the rows' energy.
    """

    step: jax.Array
    product: jax.Array
    least_squares: jax.Array
    fit: jax.Array


def _power_of_two(largest: jax.Array) -> jax.Array:
    """By what numbers up to `largest` come near 1, exactly, so that their squares neither over- nor underflow."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23  # of two, with a bias of 127
    return lax.bitcast_convert_type(jnp.maximum(254 - exponent, 1) << 23, jnp.float32)


def _product(size: jax.Array, level: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The products [...] of entries and levels, and the scales by which levels come nearest to entries."""
    product, energy = jnp.sum(counts * size * level, axis=-1), jnp.sum(counts * level**2, axis=-1)
    return product, product / jnp.where(energy > 0, energy, 1)


def _over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Entries [..., n] over their rows' scales [...], or as they are where that is 0, or nearly; one division a row."""
    return x * (1 / jnp.where(scale > _TINY, scale, 1))[..., None]


_TINY = 1e-37
"""Above it the inverse of a float32 number is finite, and ordinary."""
