"""Decode attention in plain JAX, a tile of tokens at a time, merged as in flash decoding."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax import layout
from mustafar_jax.operands import DenseAttention, PackedAttention, restored
from mustafar_jax.rotation import turn, turn_back
from mustafar_jax.rows import Rows

TILE = 128
"""Tokens that are unpacked at a time; a multiple of 32."""


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


def attend_packed(operands: PackedAttention) -> jax.Array:
    """Attention over a packed cache: its dense slots, and its packed rows, a tile of tokens at a time."""
    tail, lengths, window = operands.tail, operands.lengths, operands.window
    slots, rows, sinks = tail.key.shape[2], operands.key.length, tail.sinks
    packed = operands.packed_lengths[:, None]
    positions = layout.position_of_slot(jnp.arange(slots)[None], packed, sinks, slots - sinks)
    visible = _visible(positions, lengths, window)
    dense = _attend(operands.query, tail.key, tail.value, visible, operands.scale)
    return _normalise(dense if rows == 0 else merge(dense, _attend_rows(operands)))


def _attend_rows(operands: PackedAttention) -> Partial:
    """Attention over the packed rows."""
    rows, sinks = operands.key.length, operands.tail.sinks
    tile = min(TILE, rows)
    query = _for_rows(operands)

    def see(i: jax.Array) -> jax.Array:
        row = _tile_start(i, tile, rows) + jnp.arange(tile)[None]
        fresh = (row >= i * tile) & (row < operands.packed_lengths[:, None])  # the last may overlap the one before
        return fresh & _visible(sinks + row, operands.lengths, operands.window)

    def attend_tile(i: jax.Array, visible: jax.Array) -> Partial:
        start = _tile_start(i, tile, rows)
        key = _seen_keys(operands, operands.key.take(start, tile), start)
        value = operands.value.take(start, tile)
        return _attend(query, key, value.to_array(), visible, operands.scale)

    found = _over_tiles(attend_tile, see, -(-rows // tile), _nothing(operands.query))
    return found._replace(out=turn_back(found.out)) if operands.turned_values else found


def _for_rows(operands: PackedAttention) -> jax.Array:
    """The queries as `_seen_keys` wants them. A rotation keeps products, and to turn queries is less work than keys."""
    if not operands.turned_keys:
        return operands.query
    turned = turn(operands.query)
    both = [turned, operands.query.astype(jnp.float32)]
    return turned if operands.mean is None else jnp.concatenate(both, axis=-1)


def _seen_keys(operands: PackedAttention, keys: Rows, start: jax.Array) -> jax.Array:
    """The keys of rows [B, K, n, H] that begin at row `start`; turned ones [B, K, n, 2H] with the mean beside them."""
    if not operands.turned_keys:
        return restored(keys, turned=False, mean=operands.mean, start=start)
    if operands.mean is None:
        return keys.to_array()
    positions = operands.mean.offset + start + jnp.arange(keys.length)
    mean = operands.mean.at(positions[None])
    return jnp.concatenate([keys.to_array(), jnp.broadcast_to(mean, keys.shape)], axis=-1)


def attend_dense(operands: DenseAttention) -> jax.Array:
    """Attention on a dense cache, a tile of tokens at a time, so that no copy of the cache in float32 is made."""
    capacity = operands.key.shape[1]
    tile = min(TILE, capacity)

    def see(i: jax.Array) -> jax.Array:
        position = _tile_start(i, tile, capacity) + jnp.arange(tile)[None]
        return (position >= i * tile) & _visible(position, operands.lengths, operands.window)

    def attend_tile(i: jax.Array, visible: jax.Array) -> Partial:
        start = _tile_start(i, tile, capacity)
        both = operands.key, operands.value
        key, value = (lax.dynamic_slice_in_dim(x, start, tile, axis=1).swapaxes(1, 2) for x in both)
        return _attend(operands.query, key, value, visible, operands.scale)

    return _normalise(_over_tiles(attend_tile, see, -(-capacity // tile), _nothing(operands.query)))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scale: float) -> Partial:
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


def _normalise(partial: Partial) -> jax.Array:
    """float32 [B, K, G, H]; zeros where no token was visible."""
    total = partial.l[..., None]
    # not `total > 0`: what is not a number must not become zeros
    return jnp.where(total == 0, 0, partial.out / jnp.where(total == 0, 1, total))


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.astype(jnp.float32) for array in arrays)
