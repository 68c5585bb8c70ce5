"""Attention on caches in plain JAX, a tile of tokens at a time."""

import functools

import jax
import jax.numpy as jnp

from mustafar_jax import layout
from mustafar_jax.backend import Attended
from mustafar_jax.backends.xla.tiles import (
    Partial,
    Queries,
    Scoring,
    attend_tile,
    finished,
    in_parts,
    merge,
    nothing,
    over_keys,
    over_tiles,
)
from mustafar_jax.operands import DenseAttention, PackedAttention, restored
from mustafar_jax.rotation import turn, turn_back
from mustafar_jax.rows import Rows


def attend_packed(operands: PackedAttention) -> Attended:
    """Attention over a packed cache: its dense slots, and its packed rows, a tile of tokens at a time."""
    found = in_parts(functools.partial(_attend_packed, operands), _queries(operands))
    return finished(found, return_lse=operands.return_lse)


def _attend_packed(operands: PackedAttention, queries: Queries) -> Partial:
    tail = operands.tail
    slots, sinks = tail.key.shape[2], tail.sinks
    packed = operands.packed_lengths[:, None]
    positions = layout.position_of_slot(jnp.arange(slots)[None], packed, sinks, slots - sinks)
    visible = _visible(operands, queries, positions)
    dense = attend_tile(queries.array, tail.key, tail.value, visible, _scoring(operands))
    return dense if operands.key.length == 0 else merge(dense, _attend_rows(operands, queries))


def _attend_rows(operands: PackedAttention, queries: Queries) -> Partial:
    """Attention over the packed rows."""
    rows, query = operands.key.length, _for_rows(operands, queries.array)
    tile = min(queries.tile, rows)

    def see(row: jax.Array) -> jax.Array:
        held = row < operands.packed_lengths[:, None]
        return held[:, None] & _visible(operands, queries, operands.tail.sinks + row)

    def attend(start: jax.Array, visible: jax.Array) -> Partial:
        key = _seen_keys(operands, operands.key.take(start, tile), start)
        value = operands.value.take(start, tile)
        return attend_tile(query, key, value.to_array(), visible, _scoring(operands))

    found = over_tiles(attend, see, rows, tile, nothing(queries))
    return found._replace(out=turn_back(found.out)) if operands.turned_values else found


def _for_rows(operands: PackedAttention, query: jax.Array) -> jax.Array:
    """The queries as `_seen_keys` wants them. A rotation keeps products, and to turn queries is less work than keys."""
    if not operands.turned_keys:
        return query
    turned = turn(query)
    both = [turned, query.astype(jnp.float32)]
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


def attend_dense(operands: DenseAttention) -> Attended:
    """Attention on a dense cache."""

    def attend(queries: Queries) -> Partial:
        see = functools.partial(_visible, operands, queries)
        return over_keys(queries, operands.key, operands.value, see, _scoring(operands))

    return finished(in_parts(attend, _queries(operands)), return_lse=operands.return_lse)


def _queries(operands: DenseAttention | PackedAttention) -> Queries:
    first = operands.lengths if operands.new else operands.lengths - 1
    return Queries(operands.query, first[:, None] + jnp.arange(max(1, operands.new))[None])


def _visible(operands: DenseAttention | PackedAttention, queries: Queries, position: jax.Array) -> jax.Array:
    """bool [B, n, T]: which of the positions [B or 1, T] are those of held tokens that each query sees."""
    return (position < operands.lengths[:, None])[:, None] & queries.within(operands.window, position)


def _scoring(operands: DenseAttention | PackedAttention) -> Scoring:
    return Scoring(operands.scale, operands.soft_cap)
