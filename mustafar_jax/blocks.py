"""Any number of new tokens on any cache: a turn of a conversation, a chunk of a prompt, drafted tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.attention import (
    Options,
    Scores,
    attend_held,
    attend_prompt,
    check_query,
    decode_attention,
    operation_of,
)
from mustafar_jax.backends.registry import Candidates, Implementation, candidates, packers, preferring
from mustafar_jax.cache import LayerCache
from mustafar_jax.cache.base import check_cache
from mustafar_jax.cache.checks import check_kv, check_lengths
from mustafar_jax.cache.devices import CACHE, each_device
from mustafar_jax.cache.filling import PROMPT, append_to, as_held
from mustafar_jax.sharding import varying


@overload
def attend(
    cache: LayerCache,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | Sequence[int] | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, LayerCache]: ...


@overload
def attend(
    cache: LayerCache,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | Sequence[int] | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array, LayerCache]: ...


def attend(
    cache: LayerCache,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | Sequence[int] | None = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> tuple[jax.Array, LayerCache] | tuple[jax.Array, jax.Array, LayerCache]:
    """Attend n new tokens of each sequence to what its cache holds and to each other, and add them to the cache.

    One token (n = 1) is what `append` and `decode_attention` do: what leaves the dense window is packed first, then the
    token attends. Several attend to what is held as it stood before and, causally, to each other as they are given;
    then what leaves the window is packed, all of it at once. A cache that was empty holds afterwards what `prefill`
    fills it with, and the result is that of `prefill_attention`.

    Args:
        cache: any cache, empty or filled.
        query: [B, n, N, H] after RoPE, N a multiple of the cache's KV heads.
        key, value: [B, n, K, H] in the cache's dtype, keys after RoPE at positions `cache.lengths` and following;
            padded on the right.
        lengths: int [B], how many of the n tokens there are of each sequence, 0 .. n; all n if None. A sequence of 0 is
            left alone. Under jit, one outside of that counts as the nearest, and sets the sequence's `overflow`.
        scale, sliding_window, logits_soft_cap, return_lse: as in `decode_attention`.
        implementation: as in `decode_attention`. For several tokens, names are preferred to others: what is named may
            be for a part of the work alone, but "xla" is for all. `backends.registry.packers` says who packs then.

    Returns:
        [B, n, N, H] in the query's dtype, zeros for tokens that are not there; with `return_lse` then float32
        [B, n, N], -inf for these; and the cache with the tokens. Under jit, and where n = 1, a token for which there is
        no room is not written and sets `overflow`.

    Raises:
        ValueError: shapes or lengths that do not fit the cache or each other; several tokens, outside of jit, for which
            there is no room; sliding_window < 1, a cap that is no positive number, an unknown implementation.
        TypeError: another dtype than the cache's; a query that is not floating-point; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    if query.ndim != 4 or query.shape[1] == 0:
        raise ValueError(f"query has shape {query.shape}; wanted [B, n, N, H], n at least 1")
    tokens = query.shape[1]
    check_query(query, cache, (cache.batch, tokens), "[{}, {}, N, {}]")
    check_kv(key, value, cache.dtype, (cache.batch, tokens, cache.num_kv_heads, cache.head_dim), "[B, n, K, H]")
    cache._check_queries(query, key.shape[:2], letters="[B, n, N, H]")
    given = check_lengths(lengths, cache.batch, tokens)
    scores = Scores.of(cache.head_dim, scale, sliding_window, logits_soft_cap)
    if tokens == 1:
        there = None if lengths is None else jnp.asarray(given)
        return _attend_one(cache, query, key, value, there, scores, return_lse, implementation)
    _check_room(cache, given)
    chosen = preferring("attend_prompt", implementation), preferring(operation_of(cache), implementation)
    how = scores, return_lse, *chosen, candidates("pack", packers(implementation))
    arrays = query, *as_held(cache, key, value, axis=2), jnp.asarray(given)
    with jax.named_scope("attend"):  # a profile shows it by this name
        axes, results = (PROMPT, PROMPT, PROMPT, ("batch",)), (PROMPT, PROMPT[:3], CACHE)
        out, lse, cache = each_device(_attend_several, cache, arrays, how, axes=axes, results=results)
    return (out, lse, cache) if return_lse else (out, cache)


def _check_room(cache: LayerCache, lengths: np.ndarray | jax.Array) -> None:
    """Raise ValueError for so many new tokens [B], if they and those that are held are known, and are too many."""
    if isinstance(lengths, jax.core.Tracer) or isinstance(cache.lengths, jax.core.Tracer):
        return
    held = np.asarray(cache.lengths)
    if len(over := np.flatnonzero(held + np.asarray(lengths) > cache.capacity)):
        row = int(over[0])
        raise ValueError(
            f"lengths={np.asarray(lengths).tolist()}: sequence {row} holds {held[row]} tokens, and {lengths[row]} more "
            f"exceed the cache's capacity of {cache.capacity}"
        )


def _attend_one(
    cache: LayerCache,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None,
    scores: Scores,
    return_lse: bool,
    implementation: Implementation,
) -> Any:
    """One token [B, 1, ..] of each sequence, or of those whose length is not 0: pack, then attend."""
    there = None if lengths is None else lengths > 0
    with jax.named_scope("append"):
        chosen = candidates("pack", packers(implementation))
        cache = append_to(cache, key[:, 0], value[:, 0], query[:, 0], chosen, there)
    if lengths is not None:
        cache = dataclasses.replace(cache, overflow=cache.overflow | (lengths != jnp.clip(lengths, 0, 1)))
    options: Options = {
        "scale": scores.scale,
        "sliding_window": scores.window,
        "logits_soft_cap": scores.soft_cap,
        "implementation": implementation,
    }
    found = (
        decode_attention(query[:, 0], cache, return_lse=True, **options)
        if return_lse
        else (decode_attention(query[:, 0], cache, **options),)
    )
    out, *lse = (x[:, None] for x in found)
    if there is not None:
        out = jnp.where(there[:, None, None, None], out, 0)
        lse = [jnp.where(there[:, None, None], x, -jnp.inf) for x in lse]
    return (out, *lse, cache)


@functools.partial(jax.jit, static_argnames=("scores", "return_lse", "by_prompt", "by_cache", "packers"))
def _attend_several(
    cache: LayerCache,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    scores: Scores,
    return_lse: bool,
    by_prompt: Candidates,
    by_cache: Candidates,
    packers: Candidates,
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """See `attend`."""
    count = jnp.clip(lengths, 0, query.shape[1])  # under jit they are not known to lie there
    new = attend_prompt(query, key, value, count, scores, True, by_prompt)
    held = _attend_held(cache, query, scores, by_cache)
    out, lse = _merged(new, held)
    there = (jnp.arange(query.shape[1])[None] < count[:, None])[..., None]
    grown = cache._extend(key, value, _after(lse, count), query, packers)
    grown = dataclasses.replace(grown, overflow=grown.overflow | (count != lengths))
    out = jnp.where(there[..., None], out, 0).astype(query.dtype)
    return out, jnp.where(there, lse, -jnp.inf) if return_lse else lse, grown


def _after(first: jax.Array, count: jax.Array) -> jax.Array:
    """The int32 numbers, which XLA cannot know before the float32 array.

    What is held is thus read before it is overwritten, so that XLA need not copy it. An optimisation barrier does not
    do that: XLA for CPUs takes it away before it decides on copies.
    """
    if not varying(first) <= varying(count):  # the numbers must not seem to differ between devices
        return count
    bit = lax.bitcast_convert_type(first.reshape(-1)[0], jnp.int32) & 1
    return count + (bit >> 1)  # 0


def _attend_held(
    cache: LayerCache, query: jax.Array, scores: Scores, chosen: Candidates
) -> tuple[jax.Array, jax.Array]:
    """New queries [B, n, N, H] on what a cache holds, [B, n, N, H], and the log-sum-exp of their scores, [B, n, N]."""
    batch, tokens, _, head_dim = query.shape
    kv_heads = cache.num_kv_heads
    by_head = query.reshape(batch, tokens, kv_heads, -1, head_dim).swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
    found: tuple[jax.Array, jax.Array] = attend_held(by_head, cache, scores, True, chosen, new=tokens)
    out, lse = (x.reshape(batch, kv_heads, tokens, -1, *x.shape[3:]).swapaxes(1, 2) for x in found)
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def _merged(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention to two sets of tokens, each with its log-sum-exp, as that to both; float32."""
    largest = jnp.maximum(a[1], b[1])
    largest = jnp.where(largest == -jnp.inf, 0, largest)  # neither has a token
    weights = jnp.exp(a[1] - largest), jnp.exp(b[1] - largest)
    total = weights[0] + weights[1]
    out = sum(x[0].astype(jnp.float32) * weight[..., None] for x, weight in zip((a, b), weights, strict=True))
    return out / jnp.where(total == 0, 1, total)[..., None], largest + jnp.log(total)
