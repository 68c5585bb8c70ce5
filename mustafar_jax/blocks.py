"""Several given tokens at a time through a cache: what teacher forcing and the checking of drafted tokens need."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mustafar_jax.cache import DenseCache, LayerCache, PackedCache
from mustafar_jax.cache.checks import check_kv


def extend(
    cache: LayerCache,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Append n tokens to every sequence and attend each as `append` and `decode_attention`, token by token, would.

    One attention over dense keys replaces n over packed ones, so a dense copy of the cache is held meanwhile.

    Args:
        cache: the cache; it must have room for the tokens.
        query: [B, n, N, H] after RoPE; n at most `config.group`, so that a sequence packs at most one group meanwhile.
        key, value: [B, n, K, H] in the cache's dtype, keys after RoPE at positions `cache.lengths` and following.
        scale, sliding_window: as in `decode_attention`.

    Returns:
        [B, n, N, H] in the query's dtype, and the cache with the tokens.

    Raises:
        ValueError: n above the config's group; shapes that do not fit the cache.
        TypeError: another dtype than the cache's.
    """
    sizes = cache.batch, query.shape[1], cache.num_kv_heads, cache.head_dim
    check_kv(key, value, cache.dtype, sizes, "[B, n, K, H]")
    cache._check_queries(query, key.shape[:2], letters="[B, n, N, H]")
    if query.shape[1] > cache.config.group:
        raise ValueError(f"query has {query.shape[1]} tokens; at most group={cache.config.group} are taken at a time")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    position = cache.lengths[:, None] + jnp.arange(query.shape[1])[None]
    columns = jnp.arange(cache.capacity)[None]
    if isinstance(cache, DenseCache):
        grown = _extend_dense(cache, key, value)
        visible = _visible(position, columns, sliding_window)
        return _attend(query, grown.key, grown.value, visible, scale), grown
    assert isinstance(cache, PackedCache)
    packed = cache.packed_lengths
    # Tokens before the one that fills a group see the group that leaves then as it was: its tokens are columns of
    # their own, behind those of the cache.
    early = cache.config.packed_tokens(position + 1) == packed[:, None]
    filled = cache.lengths + jnp.minimum(early.sum(axis=1) + 1, query.shape[1])
    full = cache.write_tokens(key, value, query, cache.lengths, filled)
    after = full.pack_oldest(packed).write_tokens(key, value, query, cache.lengths, position[:, -1] + 1)
    leaves = (after.packed_lengths > packed)[:, None]
    group = cache.config.sink_tokens + packed[:, None] + jnp.arange(cache.config.group)[None]
    in_group = leaves & (columns >= group[:, :1]) & (columns <= group[:, -1:])
    of_cache = _visible(position, columns, sliding_window) & ~(early[..., None] & in_group[:, None])
    of_group = _visible(position, group, sliding_window) & early[..., None] & leaves[..., None]
    held, as_it_was = after.to_dense()[:2], full.oldest_group(packed)
    keys, values = (
        jnp.concatenate([x, jnp.where(leaves[..., None, None], y, 0).swapaxes(1, 2)], axis=1)
        for x, y in zip(held, as_it_was, strict=True)
    )
    return _attend(query, keys, values, jnp.concatenate([of_cache, of_group], axis=2), scale), after


def _extend_dense(cache: DenseCache, key: jax.Array, value: jax.Array) -> DenseCache:
    lengths = cache.lengths + key.shape[1]
    index = (jnp.arange(cache.capacity)[None] - cache.lengths[:, None])[..., None, None]  # of the token for each place

    def written(held: jax.Array, new: jax.Array) -> jax.Array:
        given = jnp.take_along_axis(new, index, axis=1, mode="clip")
        return jnp.where((index >= 0) & (index < new.shape[1]), given, held)

    return dataclasses.replace(
        cache,
        key=written(cache.key, key),
        value=written(cache.value, value),
        lengths=jnp.minimum(lengths, cache.capacity),
        overflow=cache.overflow | (lengths > cache.capacity),
    )


def _visible(position: jax.Array, columns: jax.Array, window: int | None) -> jax.Array:
    """bool [B, n, s]: what queries at positions [B, n] see of tokens at positions [B or 1, s]."""
    distance = position[..., None] - columns[:, None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
    """Attention in float32 of queries [B, n, N, H] on keys and values [B, s, K, H] where visible [B, n, s]."""
    dtype = query.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], scale=scale).astype(dtype)
