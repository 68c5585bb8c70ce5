"""Caches made of others: each sequence several times, or back at an earlier point."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mustafar_jax.cache.base import LayerCache, check_cache
from mustafar_jax.cache.checks import check_sizes
from mustafar_jax.config import CompressionConfig

Caches = TypeVar("Caches")
"""One cache, or caches in any pytree, such as those of a model's layers."""


def repeat(caches: Caches, n: int) -> Caches:
    """Each sequence n times along the batch, side by side: several answers to one prompt.

    Args:
        caches: one cache or several, in any pytree.
        n: how many times; sequence b becomes n * b to n * b + n - 1.

    Returns:
        The same of a batch n times as large; copies, so that they may be donated.

    Raises:
        ValueError: n below 1.
        TypeError: n that is no integer; what holds something else than caches.
    """
    check_sizes(n=n)
    _each(caches)
    copied: Caches = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), caches)
    return copied


def truncate(caches: Caches, lengths: ArrayLike | Sequence[int]) -> Caches:
    """Go back to an earlier point: keep the first tokens of each sequence.

    What is packed cannot be unpacked. So a sequence can go back as far as its packed tokens stay as many, or to its
    sinks alone; where further is wanted, keep the caches of that point, which `attend` leaves as they are unless they
    are donated.

    The statistics of keys stay as they were fixed when the first group was packed. Before that, the mean key is taken
    anew of what stays; the queries that weigh keys keep what the tokens that go have told. Rules that score with the
    last 32 queries have those that are left of them, until there are as many again. `overflow` stays.

    Args:
        caches: one cache or several, in any pytree, of the same batch; not traced.
        lengths: int [B], the tokens that stay, not more than there are.

    Returns:
        The caches, which may share arrays with the given ones.

    Raises:
        ValueError: lengths of another shape or dtype; one above what a sequence holds, or that needs tokens in full
            which are packed and gone, with the sequence and the shortest length that is possible.
        TypeError: caches or lengths that are traced, as under `jax.jit`; what holds something else than caches.
    """
    each = _each(caches)
    if any(isinstance(x, jax.core.Tracer) for x in (lengths, *(cache.lengths for cache in each))):
        raise TypeError("truncate takes no traced caches or lengths: call it outside of jax.jit and jax.vmap")
    wanted = np.asarray(lengths)
    if not np.issubdtype(wanted.dtype, np.integer) or wanted.ndim != 1:
        raise ValueError(f"lengths is {wanted.dtype}{list(wanted.shape)}; wanted integers [B]")
    for cache in each:
        _check_truncation(cache, wanted)

    def cut(cache: LayerCache) -> LayerCache:
        return cache._truncated(jnp.array(wanted, jnp.int32))  # each its own: a buffer is donated once

    shorter: Caches = jax.tree.map(cut, caches, is_leaf=_is_cache)
    return shorter


def shortest_length(config: CompressionConfig, length: int) -> int:
    """The shortest length, but for sinks alone, to which a sequence can go back: as many of its tokens are packed."""
    packed = int(config.packed_tokens(length))
    return config.sink_tokens + config.residual_length + packed if packed else 0


def _check_truncation(cache: LayerCache, lengths: np.ndarray) -> None:
    """Raise ValueError for lengths to which a cache cannot go back."""
    if lengths.shape != (cache.batch,):
        raise ValueError(f"lengths is {lengths.dtype}{list(lengths.shape)}; wanted integers [{cache.batch}]")
    for row, (held, wanted) in enumerate(zip(np.asarray(cache.lengths).tolist(), lengths.tolist(), strict=True)):
        if not 0 <= wanted <= held:
            raise ValueError(f"lengths[{row}]={wanted} must lie in 0 .. {held}, the tokens that sequence {row} holds")
        least = 0 if cache.config.is_dense else shortest_length(cache.config, held)
        if cache.config.sink_tokens < wanted < least:
            raise ValueError(
                f"lengths[{row}]={wanted} is too short: sequence {row} holds {held} tokens, and those that it would "
                f"need are packed; it can go back to {least}, or to {cache.config.sink_tokens} and fewer"
            )


def _each(caches: Any) -> list[LayerCache]:
    """The caches of a pytree; TypeError for anything else in it, or where there is none."""
    each = jax.tree.leaves(caches, is_leaf=_is_cache)
    for cache in each:
        check_cache(cache)
    if not each:
        raise TypeError(f"caches is {caches!r}; wanted at least one LayerCache")
    return each


def _is_cache(x: Any) -> bool:
    return isinstance(x, LayerCache)
