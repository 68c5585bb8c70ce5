"""Attention on a `LayerCache`: one query token per sequence, packed and dense parts merged as in flash decoding."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from mustafar_jax import bitmap
from mustafar_jax.bitmap import BitmapArray
from mustafar_jax.cache import DenseCache, LayerCache, PackedCache, Rows, check_cache, to_array
from mustafar_jax.implementations import (
    Implementation,
    Names,
    check_implementation,
    first_that_runs,
    kernels,
    on_cuda,
)

TILE = 128
"""Tokens that the XLA implementation unpacks at a time; a multiple of 32."""

PREFILL_CHUNK = 512
"""Queries that prefill attends at a time where scores are held in memory."""


class Partial(NamedTuple):
    """Attention over some of the tokens: what flash decoding keeps of a split.

    Attributes:
        out: float32 [B, K, G, H], the sum of exp(score - m) * value.
        m: float32 [B, K, G], the largest score; the lowest float32 where no token was visible.
        l: float32 [B, K, G], the sum of exp(score - m).
    """

    out: jax.Array
    m: jax.Array
    l: jax.Array  # noqa: E741


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the tokens of both."""
    m = jnp.maximum(a.m, b.m)
    weight_a, weight_b = jnp.exp(a.m - m), jnp.exp(b.m - m)
    out = a.out * weight_a[..., None] + b.out * weight_b[..., None]
    return Partial(out, m, a.l * weight_a + b.l * weight_b)


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
        implementation: a name in `IMPLEMENTATIONS`, a sequence of names tried in order (only NotImplementedError passes
            on to the next), or None for the best that works here. On NVIDIA GPUs, for bfloat16 and float16: "cudnn"
            for dense caches; for packed ones "mosaic_gpu" on compute capability 9.0 (Hopper), else "triton".

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
    names = check_implementation(implementation) or _present()
    with jax.named_scope("decode_attention"):  # a profile shows it by this name
        out = _decode(names, grouped, cache, scale, sliding_window)
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
        implementation: "cudnn" (NVIDIA GPUs, bfloat16 and float16), "xla", a sequence of names tried in order, or None
            for the best that works here.

    Returns:
        [B, S, N, H] in the query's dtype; rows of padding hold nothing of use.

    Raises:
        ValueError: sliding_window < 1, an unknown implementation.
        NotImplementedError: no implementation that was named can run this.
    """
    _check_window(sliding_window)
    names = check_implementation(implementation) or _present()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return _prefill(names, query, key, value, lengths, scale, sliding_window)


@functools.partial(jax.jit, static_argnames=("names", "scale", "window"))
def _prefill(
    names: Names,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    scale: float,
    window: int | None,
) -> jax.Array:
    valid = jnp.arange(query.shape[1]) < lengths[:, None]
    value = jnp.where(valid[..., None, None], value, 0)  # a weight of 0 does not silence padding that is NaN

    def run(name: str) -> jax.Array:
        if name not in _PREFILL:
            raise NotImplementedError(f"implementation={name!r} attends caches; a prompt wants one of {[*_PREFILL]}")
        return _PREFILL[name](query, key, value, scale, window)

    return first_that_runs(names, run)


def _prefill_xla(query: jax.Array, key: jax.Array, value: jax.Array, scale: float, window: int | None) -> jax.Array:
    """Attention over a prompt, some queries at a time, so that the scores of all are never held."""
    length, chunk = query.shape[1], min(query.shape[1], PREFILL_CHUNK)
    dtype = query.dtype
    if dtype == jnp.float16:  # XLA for CPUs has no float16 product with float32 sums
        query, key, value = _float32(query, key, value)

    def attend(start: jax.Array) -> jax.Array:
        # The last chunk is moved back to end with the prompt, so every chunk has the same shape.
        rows = jnp.minimum(start, length - chunk) + jnp.arange(chunk)
        distance = rows[:, None] - jnp.arange(length)
        visible = (distance >= 0) & (distance < (length if window is None else window))
        part = jnp.take(query, rows, axis=1)
        out = jax.nn.dot_product_attention(part, key, value, mask=visible[None, None], scale=scale)
        return out.astype(dtype)

    if chunk == length:
        return attend(jnp.int32(0))
    starts = jnp.arange(0, length, chunk)
    parts = lax.map(attend, starts)  # [chunks, B, chunk, N, H]
    whole = jnp.moveaxis(parts, 0, 1)
    body = whole[:, :-1].reshape(query.shape[0], -1, *query.shape[2:])
    return jnp.concatenate([body, whole[:, -1, body.shape[1] + chunk - length :]], axis=1)


@contextlib.contextmanager
def _cudnn(query: Any, key: Any) -> Iterator[None]:
    """Make NotImplementedError of what cuDNN cannot run: these dtypes, or anything on this machine."""
    if query not in (jnp.bfloat16, jnp.float16) or query != key:
        raise NotImplementedError(f"cuDNN wants bfloat16 or float16; query is {query}, keys are {key}")
    try:
        yield
    except RuntimeError as error:  # what JAX raises where there is no cuDNN, or too old a one
        raise NotImplementedError(f"cuDNN cannot run here: {error}") from error


def _prefill_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, scale: float, window: int | None) -> jax.Array:
    """Attention over a prompt through cuDNN's fused kernel."""
    reach = None if window is None else (window - 1, 0)
    with _cudnn(query.dtype, key.dtype):
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=True, local_window_size=reach, implementation="cudnn"
        )


_PREFILL: dict[str, Callable[[jax.Array, jax.Array, jax.Array, float, int | None], jax.Array]] = {
    "cudnn": _prefill_cudnn,
    "xla": _prefill_xla,
}
"""The implementations of attention over a prompt. Padding on the right needs no mask: no valid query sees it."""


@functools.partial(jax.jit, static_argnames=("names", "scale", "window"))
def _decode(names: Names, query: jax.Array, cache: LayerCache, scale: float, window: int | None) -> jax.Array:
    return first_that_runs(names, lambda name: _run(name, query, cache, scale, window))


def _present() -> tuple[str, ...]:
    """What None tries on the default backend, best first."""
    return ("cudnn", "mosaic_gpu", "triton", "xla") if on_cuda() else ("xla",)


def _run(name: str, query: jax.Array, cache: LayerCache, scale: float, window: int | None) -> jax.Array:
    if isinstance(cache, DenseCache):
        if name not in _DENSE:
            raise NotImplementedError(f"implementation={name!r} attends packed caches; this cache is dense")
        return _DENSE[name](query, cache, scale, window)
    assert isinstance(cache, PackedCache)
    if name not in _PACKED:
        raise NotImplementedError(f"implementation={name!r} does not attend packed caches in this version")
    return _PACKED[name](query, cache, scale, window)


def _normalise(partial: Partial) -> jax.Array:
    """float32 [B, K, G, H]; zeros where no token was visible."""
    total = partial.l[..., None]
    return jnp.where(total > 0, partial.out / jnp.where(total > 0, total, 1), 0)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    scale: float,
) -> Partial:
    """Attention over one tile.

    Args:
        query: [B, K, G, H].
        key, value: [B, K, T, H]; whatever stands at invisible tokens, NaN too, has no effect.
        visible: bool [B, T].
        scale: factor on the scores.
    """
    visible = visible[:, None, None]
    scores = jnp.einsum("bkgh,bkth->bkgt", *_float32(query, key), precision=lax.Precision.HIGHEST)
    scores = jnp.where(visible, scores * scale, jnp.finfo(jnp.float32).min)
    m = scores.max(axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - m[..., None]), 0)
    # A weight of 0 does not silence a NaN value; the value itself must go.
    value = jnp.where(visible[:, :, 0, :, None], value, 0)
    out = jnp.einsum("bkgt,bkth->bkgh", *_float32(weights, value), precision=lax.Precision.HIGHEST)
    return Partial(out, m, weights.sum(axis=-1))


def _attend_packed_xla(query: jax.Array, cache: PackedCache, scale: float, window: int | None) -> jax.Array:
    """Attention over a packed cache: its dense slots, and its packed rows, a tile of tokens at a time."""
    visible = _visible(cache.dense_positions(), cache.lengths, window)
    dense = _attend(query, cache.keys.dense, cache.values.dense, visible, scale)
    rows, sinks = cache.config.packed_tokens(cache.capacity), cache.config.sink_tokens
    if rows == 0:
        return _normalise(dense)
    tile = min(TILE, rows)

    def see(i: jax.Array) -> jax.Array:
        row = _tile_start(i, tile, rows) + jnp.arange(tile)
        fresh = (row >= i * tile) & (row < cache.packed_lengths[:, None])  # the last tile may overlap the one before
        return fresh & _visible(sinks + row[None], cache.lengths, window)

    def attend_tile(i: jax.Array, visible: jax.Array) -> Partial:
        start = _tile_start(i, tile, rows)
        key, value = (_tile(store.packed, start, tile) for store in (cache.keys, cache.values))
        key = cache.unpack_keys(key, (sinks + start + jnp.arange(tile))[None])
        return _attend(query, key, to_array(value), visible, scale)

    return _normalise(_over_tiles(attend_tile, see, -(-rows // tile), dense))


def _attend_packed_kernels(
    query: jax.Array,
    cache: PackedCache,
    scale: float,
    window: int | None,
    *,
    module: str,
    interpret: bool = False,
) -> jax.Array:
    """Attention over a packed cache by Pallas kernels, those of the module `mustafar_jax.pallas_kernels.<module>`."""
    rows = kernels("rows")

    def kernel_rows(packed: Rows) -> Any:
        return rows.Packed(packed.bitmap, packed.values) if isinstance(packed, BitmapArray) else packed

    sinks = min(cache.config.sink_tokens, cache.capacity)
    out: jax.Array = kernels(module).decode_attention(
        query,
        kernel_rows(cache.keys.packed),
        kernel_rows(cache.values.packed),
        rows.Tail(cache.keys.dense, cache.values.dense, sinks),
        cache.lengths,
        cache.packed_lengths,
        scale=scale,
        window=window,
        mean=cache.kernels_mean(),
        interpret=interpret,
    )
    return out


_attend_packed_triton = functools.partial(_attend_packed_kernels, module="triton.decode_attention")
_attend_packed_mosaic_gpu = functools.partial(_attend_packed_kernels, module="mosaic.decode_attention")


def _attend_dense_xla(query: jax.Array, cache: DenseCache, scale: float, window: int | None) -> jax.Array:
    """Attention on a dense cache, a tile of tokens at a time, so that no copy of the cache in float32 is made."""
    tile = min(TILE, cache.capacity)

    def see(i: jax.Array) -> jax.Array:
        position = _tile_start(i, tile, cache.capacity) + jnp.arange(tile)
        return (position >= i * tile) & _visible(position[None], cache.lengths, window)

    def attend_tile(i: jax.Array, visible: jax.Array) -> Partial:
        start = _tile_start(i, tile, cache.capacity)
        key, value = (lax.dynamic_slice_in_dim(x, start, tile, axis=1).swapaxes(1, 2) for x in (cache.key, cache.value))
        return _attend(query, key, value, visible, scale)

    return _normalise(_over_tiles(attend_tile, see, -(-cache.capacity // tile), _nothing(query)))


def _attend_dense_cudnn(query: jax.Array, cache: DenseCache, scale: float, window: int | None) -> jax.Array:
    """Attention on a dense cache through cuDNN's fused kernel."""
    if window is not None:
        raise NotImplementedError(f"cuDNN decoding has no sliding window; got sliding_window={window}")
    batch, kv_heads, group, head_dim = query.shape
    with _cudnn(query.dtype, cache.dtype):
        out = jax.nn.dot_product_attention(
            query.reshape(batch, 1, kv_heads * group, head_dim),
            cache.key,
            cache.value,
            scale=scale,
            key_value_seq_lengths=cache.lengths,
            implementation="cudnn",
        )
    some = (cache.lengths > 0)[:, None, None, None]
    return jnp.where(some, out.reshape(query.shape), 0)


_PACKED: dict[str, Callable[[jax.Array, PackedCache, float, int | None], jax.Array]] = {
    "mosaic_gpu": _attend_packed_mosaic_gpu,
    "triton": _attend_packed_triton,
    "xla": _attend_packed_xla,
}
_DENSE: dict[str, Callable[[jax.Array, DenseCache, float, int | None], jax.Array]] = {
    "cudnn": _attend_dense_cudnn,
    "xla": _attend_dense_xla,
}


def _check_decode(query: jax.Array, cache: LayerCache, sliding_window: int | None) -> None:
    check_cache(cache)
    if query.ndim != 3 or query.shape[0] != cache.batch or query.shape[2] != cache.head_dim:
        raise ValueError(f"query has shape {query.shape}; the cache wants [{cache.batch}, N, {cache.head_dim}]")
    if query.shape[1] % cache.num_kv_heads or query.shape[1] == 0:
        raise ValueError(f"query has {query.shape[1]} heads; wanted a multiple of the cache's {cache.num_kv_heads}")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query has dtype {query.dtype}; wanted a floating-point one")
    _check_window(sliding_window)


def _check_window(sliding_window: Any) -> None:
    if sliding_window is not None and (not isinstance(sliding_window, int | np.integer) or sliding_window < 1):
        raise ValueError(f"{sliding_window=} must be an integer of at least 1, or None")


def _over_tiles(
    attend_tile: Callable[[jax.Array, jax.Array], Partial],
    see: Callable[[jax.Array], jax.Array],
    tiles: int,
    empty: Partial,
) -> Partial:
    """Attention over all tiles, skipping those in which no sequence sees a token.

    The skip also keeps each tile's conversion to float32 inside the loop: XLA for CPUs would otherwise hoist the
    conversion of the whole bfloat16 cache out of it.
    """

    def step(i: jax.Array, partial: Partial) -> Partial:
        visible = see(i)
        return lax.cond(visible.any(), lambda p: merge(p, attend_tile(i, visible)), lambda p: p, partial)

    return lax.fori_loop(0, tiles, step, empty)


def _tile_start(i: jax.Array, tile: int, rows: int) -> jax.Array:
    """Where tile i starts; the last one is moved back to end with the rows."""
    return jnp.minimum(i * tile, rows - tile)


def _visible(position: jax.Array, lengths: jax.Array, window: int | None) -> jax.Array:
    """bool [B, T]: which of the positions [B or 1, T] the last token of each sequence sees."""
    visible = position < lengths[:, None]
    return visible if window is None else visible & (position >= lengths[:, None] - window)


def _nothing(query: jax.Array) -> Partial:
    """Attention over no token, for queries [B, K, G, H]."""
    zeros = jnp.zeros(query.shape, jnp.float32)
    return Partial(zeros, jnp.full(query.shape[:-1], jnp.finfo(jnp.float32).min), zeros[..., 0])


def _tile(packed: Rows, start: jax.Array, length: int) -> Rows:
    """Rows start .. start + length - 1 of [B, K, S, H]."""
    if isinstance(packed, BitmapArray):
        return bitmap.take(packed, start, length)
    return lax.dynamic_slice_in_dim(packed, start, length, axis=2)


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.astype(jnp.float32) for array in arrays)


def prefill_attention_nbytes(
    tokens: int, length: int, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> int:
    """Bytes that attention over prompts of `length` tokens, `tokens` in all, works in on an NVIDIA GPU.

    Queries and outputs, keys and values once; in float32, which cuDNN does not take, also the scores of some queries
    (`PREFILL_CHUNK`), three times.
    """
    itemsize = jnp.dtype(dtype).itemsize
    scores = 0 if itemsize == 2 else 3 * num_heads * min(length, PREFILL_CHUNK)
    return tokens * itemsize * (2 * (num_heads + num_kv_heads) * head_dim + scores)
