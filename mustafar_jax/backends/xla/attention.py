"""Attention on caches in plain JAX, a tile of tokens at a time."""

import functools
from collections.abc import Callable

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
from mustafar_jax.sharding import varying_as


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
    rows = operands.key.length
    tile, (query, seen_keys) = min(queries.tile, rows), _as_rows_are(operands, queries)

    def see(row: jax.Array) -> jax.Array:
        held = row < operands.packed_lengths[:, None]
        return held[:, None] & _visible(operands, queries, operands.tail.sinks + row)

    def attend(start: jax.Array, visible: jax.Array) -> Partial:
        key = seen_keys(operands.key.take(start, tile), start)
        value = operands.value.take(start, tile)
        return attend_tile(query, key, value.to_array(), visible, _scoring(operands))

    empty = varying_as(nothing(queries), operands.key, operands.value, operands.packed_lengths)
    found = over_tiles(attend, see, rows, tile, empty)
    return found._replace(out=turn_back(found.out)) if operands.turned_values else found


SeenKeys = Callable[[Rows, jax.Array], jax.Array]
"""Rows that begin at a row of their cache -> the keys that queries are multiplied with."""


def _as_rows_are(operands: PackedAttention, queries: Queries) -> tuple[jax.Array, SeenKeys]:
    """Queries and keys whose products are those of the queries with the keys that rows stand for.

    A rotation keeps products, so queries are turned in place of keys. For several tokens the mean is turned, too, which
    is little work beside theirs; for one it stands beside the keys, as the queries do beside themselves.
    """
    mean = operands.mean
    if not operands.turned_keys:
        return queries.array, lambda rows, start: restored(rows, turned=False, mean=mean, start=start)
    turned = turn(queries.array)
    if mean is None:
        return turned, lambda rows, start: rows.to_array()

    def mean_at(rows: Rows, start: jax.Array) -> jax.Array:
        return mean.at((mean.offset + start + jnp.arange(rows.length))[None])

    def beside(rows: Rows, start: jax.Array) -> jax.Array:
        return jnp.concatenate([rows.to_array(), jnp.broadcast_to(mean_at(rows, start), rows.shape)], axis=-1)

    if queries.tokens > 1:
        return turned, lambda rows, start: rows.to_array() + turn(mean_at(rows, start))
    return jnp.concatenate([turned, queries.array.astype(jnp.float32)], axis=-1), beside


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
    return Scoring.of(operands, tokens=max(1, operands.new))
