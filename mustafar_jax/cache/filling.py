"""The ways to fill a cache: a prompt in place of what it holds, one token of each sequence, or several."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Candidates, Implementation, candidates
from mustafar_jax.cache.base import LayerCache, check_cache
from mustafar_jax.cache.checks import check_kv, check_lengths, check_rows
from mustafar_jax.cache.devices import CACHE, each_device

TOKEN = ("batch", "kv_heads", None)
"""The logical axes of one token of each sequence, [B, K, H] or [B, N, H]."""

PROMPT = ("batch", None, "kv_heads", None)
"""Those of several, [B, n, K, H] or [B, n, N, H]."""


def prefill(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | Sequence[int] | None = None,
    *,
    query: jax.Array | None = None,
    rows: ArrayLike | Sequence[int] | None = None,
    implementation: Implementation = None,
) -> LayerCache:
    """Replace what a cache holds by a prompt's keys and values, pruning and packing what leaves the dense window.

    `attend` adds to what a cache holds.

    Args:
        cache: the cache; what its sequences (those in `rows`) held is replaced.
        key, value: [B, S, K, H] in the cache's dtype, keys after RoPE at positions 0 .. S - 1; padded on the right.
        lengths: int [B], valid tokens of each sequence, 0 .. S; all S if None. Under jit, one outside of that counts as
            the nearest, and sets the sequence's `overflow`.
        query: [B, S, N, H] after RoPE, needed (and read) where keys are weighed, or a method scores with the most
            recent queries. Where it scores with their attention, that is over all earlier tokens, whatever sliding
            window the model has.
        rows: int [B], the cache's sequences to fill, each at most once; all of them, in order, if None. The named
            sequences' part of the cache is copied once.
        implementation: who prunes and packs: "triton" (NVIDIA GPUs, bfloat16 and float16, by magnitude), "xla", a
            sequence of names (the first that can is taken), or None for the best that works here. What is packed is
            the same. `backends.registry.packers` says which of these go with a name for attention.

    Raises:
        ValueError: shapes, lengths or rows that do not fit the cache or each other, S above the capacity, an unknown
            implementation.
        TypeError: another dtype than the cache's; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    packers = candidates("pack", implementation)
    batch = cache.batch if rows is None else check_rows(rows, cache.batch)
    check_kv(key, value, cache.dtype, (batch, None, cache.num_kv_heads, cache.head_dim), "[B, S, K, H]")
    cache._check_prompt_queries(query, key.shape[:2])
    if key.shape[1] > cache.capacity:
        raise ValueError(f"key has {key.shape[1]} tokens; the cache's capacity is {cache.capacity}")
    given = jnp.asarray(check_lengths(lengths, batch, key.shape[1]))
    lengths = jnp.clip(given, 0, key.shape[1])  # under jit they are not known to lie there
    part = cache if rows is None else jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], cache)
    arrays = *as_held(part, key, value, axis=2), lengths, query
    part = each_device(_prefill, part, arrays, (packers,), axes=(PROMPT, PROMPT, ("batch",), PROMPT), results=CACHE)
    part = dataclasses.replace(part, overflow=part.overflow | (given != lengths))
    if rows is None:
        return part
    return jax.tree.map(lambda whole, new: whole.at[jnp.asarray(rows)].set(new), cache, part)


def append(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    *,
    query: jax.Array | None = None,
    implementation: Implementation = None,
) -> LayerCache:
    """Add one token to every sequence; where that fills a group of recent tokens, prune and pack the oldest one.

    Args:
        cache: the cache; a sequence that is at its capacity keeps its tokens and gets `overflow` set.
        key, value: [B, K, H] in the cache's dtype, the key after RoPE at position `cache.lengths`.
        query: [B, N, H], the token's own after RoPE, needed (and read) where a method scores with recent queries. Where
            keys are weighed, it is read until the first tokens are packed: without it the weights are the prompt's, or
            all 1 where there was none.
        implementation: as in `prefill`.

    Raises:
        ValueError: shapes that do not fit the cache, an unknown implementation.
        TypeError: another dtype than the cache's; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    packers = candidates("pack", implementation)
    check_kv(key, value, cache.dtype, (cache.batch, cache.num_kv_heads, cache.head_dim), "[B, K, H]")
    cache._check_queries(query, key.shape[:1], letters="[B, N, H]")
    with jax.named_scope("append"):  # a profile shows it by this name
        return append_to(cache, key, value, query, packers)


def append_to(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    query: jax.Array | None,
    packers: Candidates,
    there: jax.Array | None = None,
) -> LayerCache:
    """See `append`, which has checked the arguments; `there`, bool [B], says which sequences get their token."""
    arrays = *as_held(cache, key, value, axis=1), query, there
    return each_device(_append, cache, arrays, (packers,), axes=(TOKEN, TOKEN, TOKEN, ("batch",)), results=CACHE)


def _prefill(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    query: jax.Array | None,
    packers: Candidates,
) -> LayerCache:
    return cache._prefill(key, value, lengths, query, packers)


def _append(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    query: jax.Array | None,
    there: jax.Array | None,
    packers: Candidates,
) -> LayerCache:
    return cache._append(key, value, query, packers, there)


def as_held(cache: LayerCache, *arrays: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """Keys or values, each head as often as the cache holds it."""
    repeats = cache._repeats
    return arrays if repeats == 1 else tuple(jnp.repeat(x, repeats, axis=axis) for x in arrays)
