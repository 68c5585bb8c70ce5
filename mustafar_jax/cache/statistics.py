"""What the first tokens tell of keys: their mean, the channels' weights; and what recent queries attend to.

Mean and weights are fixed when the first group of a sequence is packed: from the prompt, or, where that was too short
to pack any, from the tokens that there are then. Which calls brought these makes no difference but for rounding.
"""

import math

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


def mean_key(config: CompressionConfig, key: jax.Array, lengths: jax.Array, inv_freq: tuple[float, ...]) -> jax.Array:
    """float32 [B, K, H]: the mean, before RoPE, of a prompt's keys [B, S, K, H] but for the sinks and the window.

    Of a prompt too short to be packed, with the window.
    """
    position = jnp.arange(key.shape[1])[None]
    last = jnp.where(lengths < config.shortest_packed, lengths, lengths - config.residual_length)[:, None]
    counted = (position >= config.sink_tokens) & (position < last)
    total = _total_before_rope(key, position, counted, inv_freq)
    return total / jnp.maximum(counted.sum(axis=1), 1).astype(jnp.float32)[:, None, None]


def mean_with(
    config: CompressionConfig,
    mean: jax.Array,
    key: jax.Array,
    position: jax.Array,
    new: jax.Array,
    inv_freq: tuple[float, ...],
) -> jax.Array:
    """The mean key with tokens that come before anything is packed; as it was after that.

    Args:
        config: of the cache.
        mean: float32 [B, K, H], of the tokens before.
        key: [B, n, K, H], at positions [B, n] that follow each other.
        position: see above.
        new: bool [B, n], which of them there are.
        inv_freq: the RoPE frequencies.
    """
    counted = new & (position >= config.sink_tokens) & (position < config.shortest_packed)
    before = jnp.maximum(jnp.min(position, axis=1, where=counted, initial=config.shortest_packed), config.sink_tokens)
    before = (before - config.sink_tokens).astype(jnp.float32)[:, None, None]
    more = counted.sum(axis=1).astype(jnp.float32)[:, None, None]
    total = _total_before_rope(key, position, counted, inv_freq)
    return mean + (total - mean * more) / jnp.maximum(before + more, 1)


def _total_before_rope(
    key: jax.Array, position: jax.Array, counted: jax.Array, inv_freq: tuple[float, ...]
) -> jax.Array:
    """float32 [B, K, H]: the sum of the counted ones of keys [B, n, K, H], turned back to position 0."""
    before_rope = rotate(key, -position[..., None], jnp.asarray(inv_freq))
    return jnp.sum(jnp.where(counted[..., None, None], before_rope, 0), axis=1)


def prompt_norm(config: CompressionConfig, query: jax.Array, lengths: jax.Array, num_kv_heads: int) -> jax.Array:
    """float32 [B, K, H]: `pruning.query_norm` of a prompt's last queries of [B, S, N, H].

    Of a prompt too short to be packed all of them, to which those of later calls are added.
    """
    recent = min(max(WEIGHING, config.shortest_packed), query.shape[1])
    position = lengths[:, None] - recent + jnp.arange(recent)[None]
    first = jnp.where(lengths < config.shortest_packed, 0, jnp.maximum(lengths - WEIGHING, 0))[:, None]
    last = jnp.take_along_axis(query, position[:, :, None, None], axis=1, mode="clip")
    return query_norm(last, position >= first, num_kv_heads)


def norm_with(
    config: CompressionConfig, norm: jax.Array, query: jax.Array, position: jax.Array, new: jax.Array
) -> jax.Array:
    """The queries' norm with those of tokens that come before anything is packed; as it was after that.

    Args:
        config: of the cache.
        norm: float32 [B, K, H], of the queries before.
        query: [B, n, N, H], at positions [B, n].
        position: see above.
        new: bool [B, n], which of them there are.
    """
    counted = new & (position < config.shortest_packed)
    return jnp.hypot(norm, query_norm(query, counted, norm.shape[1]))


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
