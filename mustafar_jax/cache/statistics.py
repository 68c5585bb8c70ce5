"""What the first tokens tell of keys: their mean, the channels' weights; and what recent queries attend to.

Mean and weights are fixed when the first group of a sequence is packed: from the prompt, or, where that was too short
to pack any, from the tokens that there are then. Which calls brought these makes no difference but for rounding.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.config import CompressionConfig
from mustafar_jax.pruning import RECENT, WEIGHING, query_norm
from mustafar_jax.rope import rotate


def frequencies(config: CompressionConfig, inv_freq: ArrayLike | None, head_dim: int) -> tuple[float, ...] | None:
    """The RoPE frequencies as a static tuple where keys are centred, else None.

    Raises ValueError where they are missing or of another shape, TypeError where they are traced.
    """
    if not (config.center_keys and config.compresses_keys):
        return None
    if inv_freq is None:
        raise ValueError("inv_freq=None: center_keys=True needs the model's RoPE frequencies, [head_dim / 2]")
    if isinstance(inv_freq, jax.core.Tracer):
        raise TypeError("inv_freq is traced; wanted numbers: compute it outside of jit, or with numpy")
    if np.shape(inv_freq) != (head_dim // 2,):
        raise ValueError(f"inv_freq has shape {np.shape(inv_freq)}; wanted [{head_dim // 2}]")
    return tuple(np.asarray(inv_freq, np.float32).tolist())


def mean_with(
    config: CompressionConfig,
    mean: jax.Array,
    key: jax.Array,
    lengths: jax.Array,
    count: jax.Array,
    inv_freq: tuple[float, ...],
) -> jax.Array:
    """The mean key, before RoPE, with tokens that come before anything is packed; as it was after that.

    It is that of the first `config.shortest_packed` keys but for the sinks; of a prompt that is as long as that, of all
    but for the sinks and the window.

    Args:
        config: of the cache.
        mean: float32 [B, K, H], of the tokens before.
        key: [B, n, K, H], at the positions from `lengths` on.
        lengths: int32 [B], the tokens before.
        count: int32 [B], how many of the keys there are.
        inv_freq: the RoPE frequencies.
    """
    position = lengths[:, None] + jnp.arange(key.shape[1])[None]
    short = jnp.minimum(lengths + count, config.shortest_packed)
    last = jnp.where(_packs_at_once(config, lengths, count), count - config.residual_length, short)
    counted = (position >= config.sink_tokens) & (position < last[:, None])
    before = jnp.clip(lengths, config.sink_tokens, config.shortest_packed) - config.sink_tokens
    mean = jnp.where((before > 0)[:, None, None], mean, 0)
    before_rope = rotate(key, -position[..., None], jnp.asarray(inv_freq))
    total = jnp.sum(jnp.where(counted[..., None, None], before_rope, 0), axis=1)
    before, more = (tokens.astype(jnp.float32)[:, None, None] for tokens in (before, counted.sum(axis=1)))
    return mean + (total - mean * more) / jnp.maximum(before + more, 1)


def norm_with(
    config: CompressionConfig,
    norm: jax.Array,
    query: jax.Array,
    lengths: jax.Array,
    count: jax.Array,
    of_all: Callable[[jax.Array], jax.Array] = lambda norm: norm,
) -> jax.Array:
    """The queries' norm with those of tokens that come before anything is packed; as it was after that.

    It is `pruning.query_norm` of the first `config.shortest_packed` queries; of a prompt that is as long as that, of
    the last 512.

    Args:
        config: of the cache.
        norm: float32 [B, K, H], of the queries before.
        query: [B, n, N, H], at the positions from `lengths` on.
        lengths: int32 [B], the tokens before.
        count: int32 [B], how many of the queries there are.
        of_all: from the norm of this device's queries to that of all that share a KV head.
    """
    whole = _packs_at_once(config, lengths, count)[:, None]
    size = min(max(WEIGHING, config.shortest_packed), query.shape[1])
    index = jnp.arange(size)[None]
    if size < query.shape[1]:  # those that count are gathered
        index = jnp.where(whole, count[:, None] - size, 0) + index
        query = jnp.take_along_axis(query, index[:, :, None, None], axis=1, mode="clip")
    early = jnp.where(whole, index >= count[:, None] - WEIGHING, lengths[:, None] + index < config.shortest_packed)
    norm = jnp.where((lengths > 0)[:, None, None], norm, 0)
    return jnp.hypot(norm, of_all(query_norm(query, early & (index >= 0) & (index < count[:, None]), norm.shape[1])))


def _packs_at_once(config: CompressionConfig, lengths: jax.Array, count: jax.Array) -> jax.Array:
    """bool [B]: whether these are a sequence's first tokens, and as many as have a group packed."""
    return (lengths == 0) & (count >= config.shortest_packed)


def query_positions(lengths: jax.Array) -> jax.Array:
    """int32 [B, 32]: the position of the query in each slot of the recent ones, negative where there is none."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(RECENT)[None]) % RECENT


def recent_queries(query: jax.Array, lengths: jax.Array, dtype: np.dtype) -> jax.Array:
    """[B, N, 32, H]: the last queries of a prompt's [B, S, N, H], each in its slot; zero where there is none."""
    positions = query_positions(lengths)[:, None, :, None]
    recent = jnp.take_along_axis(query.swapaxes(1, 2), positions, axis=2, mode="clip")
    return jnp.where(positions >= 0, recent, 0).astype(dtype)


def attention_received(queries: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
    """Causal attention, by token: the probabilities that queries give it, summed. It knows of no sliding window.

    Args:
        queries: float32 [B, K, G * n, H], after RoPE.
        positions: int32 [B, n], of each head's queries; negative where there is none.
        key: [B, S, K, H].

    Returns:
        float32 [B, K, S].
    """
    group = queries.shape[2] // positions.shape[1]
    position = jnp.tile(positions, (1, group))[:, None, :, None]
    exact = queries, key.astype(jnp.float32)
    scores = jnp.einsum("bkqh,bskh->bkqs", *exact, precision=lax.Precision.HIGHEST) / math.sqrt(key.shape[-1])
    visible = (jnp.arange(key.shape[1])[None, None, None] <= position) & (position >= 0)
    lowest = jnp.finfo(jnp.float32).min
    largest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=lowest)
    weights = jnp.where(visible, jnp.exp(scores - largest), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.sum(weights / jnp.where(total > 0, total, 1), axis=2)
