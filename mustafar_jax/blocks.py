"""Several given tokens at a time through a cache: what teacher forcing and the checking of drafted tokens need."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.cache import DenseCache, LayerCache, append
from mustafar_jax.writes import write_rows


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
        ValueError: n above the config's group.
    """
    if query.shape[1] > cache.config.group:
        raise ValueError(f"query has {query.shape[1]} tokens; at most group={cache.config.group} are taken at a time")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    before = cache.lengths
    position = before[:, None] + jnp.arange(query.shape[1])

    def add(cache: LayerCache, token: tuple[jax.Array, ...]) -> tuple[LayerCache, None]:
        query, key, value = token
        return append(cache, key, value, query=query), None

    grown, _ = lax.scan(add, cache, tuple(x.swapaxes(0, 1) for x in (query, key, value)))
    after = _attend(query, *grown.to_dense()[:2], position, scale, sliding_window)
    if isinstance(cache, DenseCache):
        return after, grown
    # Tokens that come before the one that fills a group see that group as it was.
    old_key, old_value, _ = cache.to_dense()
    seen_key, seen_value = write_rows(old_key, key, before, axis=1), write_rows(old_value, value, before, axis=1)
    early = _attend(query, seen_key, seen_value, position, scale, sliding_window)
    packs = cache.config.packed_tokens(position + 1) > cache.config.packed_tokens(before)[:, None]
    return jnp.where(packs[..., None, None], after, early), grown


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, position: jax.Array, scale: float, window: int | None
) -> jax.Array:
    """Causal attention of queries [B, n, N, H] at positions [B, n] on key and value [B, S, K, H]."""
    distance = position[:, :, None] - jnp.arange(key.shape[1])
    visible = (distance >= 0) & (distance < (key.shape[1] if window is None else window))
    dtype = query.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], scale=scale).astype(dtype)
