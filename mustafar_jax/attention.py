"""Attention on a `LayerCache` and over prompts, by the backend that is named, or the best that works here."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mustafar_jax.backend import OperationName
from mustafar_jax.backends import registry
from mustafar_jax.backends.registry import Candidates, Implementation, candidates
from mustafar_jax.backends.xla.prompt import CHUNK
from mustafar_jax.cache import DenseCache, LayerCache, PackedCache
from mustafar_jax.cache.base import check_cache
from mustafar_jax.operands import DenseAttention, PackedAttention, PromptAttention


def decode_attention(
    query: jax.Array,
    cache: LayerCache,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Attend the last token of each sequence to its cache, in which it already is.

    Args:
        query: [B, N, H] after RoPE, N a multiple of the cache's KV heads; query head n reads KV head n // (N / K).
        cache: the cache, with the query's own token appended; a sequence of length 0 yields zeros.
        scale: factor on the scores, 1 / sqrt(H) if None.
        sliding_window: the query at position p sees positions s with p - s < sliding_window; all if None.
        implementation: "mosaic_gpu", "triton", "cudnn" or "xla", a sequence of names (the first that can run this is
            taken), or None for the best that works here. On NVIDIA GPUs, for bfloat16 and float16: "cudnn" for dense
            caches; for packed ones "mosaic_gpu" on compute capability 9.0 (Hopper), else "triton".
            `mustafar_jax.explain` says what is taken, and why not another.

    Returns:
        [B, N, H] in the query's dtype.

    Raises:
        ValueError: shapes that do not fit, sliding_window < 1, an unknown implementation.
        TypeError: a query that is not floating-point.
        NotImplementedError: no implementation that was named can run this.
    """
    _check_decode(query, cache, sliding_window)
    batch, num_heads, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    grouped = query.reshape(batch, cache.num_kv_heads, num_heads // cache.num_kv_heads, head_dim)
    chosen = candidates(_operation(cache), implementation)
    with jax.named_scope("decode_attention"):  # a profile shows it by this name
        out = _decode(grouped, cache, scale, sliding_window, chosen)
    return out.reshape(query.shape).astype(query.dtype)


def prefill_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Causal attention over a prompt, padded on the right; dense.

    Args:
        query: [B, S, N, H].
        key, value: [B, S, K, H].
        lengths: int32 [B], valid tokens; the keys and values of what follows them, NaN too, have no effect.
        scale: factor on the scores, 1 / sqrt(H) if None.
        sliding_window: as in `decode_attention`.
        implementation: "cudnn" (NVIDIA GPUs, bfloat16 and float16), "xla", a sequence of names (the first that can run
            this is taken), or None for the best that works here.

    Returns:
        [B, S, N, H] in the query's dtype; rows of padding hold nothing of use.

    Raises:
        ValueError: sliding_window < 1, an unknown implementation.
        NotImplementedError: no implementation that was named can run this.
    """
    check_window(sliding_window)
    chosen = candidates("attend_prompt", implementation)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return _prefill(query, key, value, lengths, scale, sliding_window, chosen)


@functools.partial(jax.jit, static_argnames=("scale", "window", "chosen"))
def _prefill(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    chosen: Candidates,
) -> jax.Array:
    valid = jnp.arange(query.shape[1])[None] < lengths[:, None]
    value = jnp.where(valid[..., None, None], value, 0)  # a weight of 0 does not silence padding that is NaN
    out: jax.Array = registry.run("attend_prompt", PromptAttention(query, key, value, scale, window), chosen)
    return out


@functools.partial(jax.jit, static_argnames=("scale", "window", "chosen"))
def _decode(query: jax.Array, cache: LayerCache, scale: float, window: int | None, chosen: Candidates) -> jax.Array:
    out: jax.Array = registry.run(_operation(cache), decode_operands(query, cache, scale, window), chosen)
    return out


def _operation(cache: LayerCache) -> OperationName:
    return "attend_dense" if isinstance(cache, DenseCache) else "attend_packed"


def decode_operands(
    query: jax.Array, cache: LayerCache, scale: float, window: int | None
) -> DenseAttention | PackedAttention:
    """What a backend is given to attend queries [B, K, G, H] to a cache."""
    if isinstance(cache, DenseCache):
        return DenseAttention(query, cache.key, cache.value, cache.lengths, scale, window)
    assert isinstance(cache, PackedCache)
    return PackedAttention(
        query,
        cache.keys.packed,
        cache.values.packed,
        cache.tail,
        cache.lengths,
        cache.packed_lengths,
        cache.mean,
        scale,
        window,
        cache.config.rotate_keys,
        cache.config.rotate_values,
    )


def _check_decode(query: jax.Array, cache: LayerCache, sliding_window: int | None) -> None:
    check_cache(cache)
    if query.ndim != 3 or query.shape[0] != cache.batch or query.shape[2] != cache.head_dim:
        raise ValueError(f"query has shape {query.shape}; the cache wants [{cache.batch}, N, {cache.head_dim}]")
    if query.shape[1] % cache.num_kv_heads or query.shape[1] == 0:
        raise ValueError(f"query has {query.shape[1]} heads; wanted a multiple of the cache's {cache.num_kv_heads}")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query has dtype {query.dtype}; wanted a floating-point one")
    check_window(sliding_window)


def check_window(sliding_window: Any) -> None:
    """Raise ValueError unless it is an integer of at least 1, or None."""
    if sliding_window is not None and (not isinstance(sliding_window, int | np.integer) or sliding_window < 1):
        raise ValueError(f"{sliding_window=} must be an integer of at least 1, or None")


def prefill_attention_nbytes(
    tokens: int, length: int, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> int:
    """Bytes that attention over prompts of `length` tokens, `tokens` in all, works in on an NVIDIA GPU.

    Queries and outputs, keys and values once; in float32, which cuDNN does not take, also the scores of some queries
    (`prompt.CHUNK`), three times.
    """
    itemsize = jnp.dtype(dtype).itemsize
    scores = 0 if itemsize == 2 else 3 * num_heads * min(length, CHUNK)
    return tokens * itemsize * (2 * (num_heads + num_kv_heads) * head_dim + scores)
