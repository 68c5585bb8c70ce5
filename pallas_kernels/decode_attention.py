"""Split-K flash decoding over packed keys and values, or over either of them dense."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.pallas_kernels import launch, tile, triton
from mustafar_jax.pallas_kernels.rows import Packed, Rows, check_dtype, flat, load_tile, per_head, row_count
from mustafar_jax.pallas_kernels.tile import COLUMNS, TOKENS, TileReader

_QUERY_ROWS = 16
"""Rows of the smallest matrix product; query heads are padded to them."""


class Mean(NamedTuple):
    """What was taken off packed keys: a mean key, rotated to each token's position.

    Attributes:
        key: float32 [B, K, H], before rotation.
        inv_freq: float32 [H / 2], RoPE's frequencies; channel i pairs with i + H / 2.
        offset: the position of row 0.
    """

    key: jax.Array
    inv_freq: jax.Array
    offset: int


def decode_attention(
    query: jax.Array,
    key: Rows,
    value: Rows,
    first: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    mean: Mean | None = None,
    params: launch.DecodeParams | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend one query per head to the rows first <= row < last of each sequence.

    Each block of 128 threads takes 128 tokens at a time (`tile`), decodes each KV head once for all of its query heads
    and multiplies on the tensor cores. Tiles without a visible row are skipped.

    Args:
        query: [B, K, G, H], G from 1 to 16.
        key, value: rows [B, K, S, H] of the query's dtype, packed or dense; rows outside first .. last may hold
            anything.
        first, last: int32 [B]; a sequence with last <= first sees nothing.
        scale: factor on the scores.
        mean: where keys are centred, what to add back.
        params: launch parameters; tuned ones for this device, or a heuristic, if None.
        interpret: run as plain JAX, anywhere.

    Returns:
        Float32 (out [B, K, G, H], m [B, K, G], l [B, K, G]): unnormalised sums, the largest score (the lowest float32
        where nothing was visible) and the sum of exp(score - m).

    Raises:
        NotImplementedError: see `triton.check_supported`; also for values or keys of another dtype than the query's.
        ValueError: more splits than tiles.

    Source: FlashDecoding (pytorch.org/blog/flash-decoding); the format of arXiv 2505.22913.
    """
    batch, kv_heads, group, head_dim = query.shape
    triton.check_supported(dtype=query.dtype, head_dim=head_dim, queries_per_head=group)
    check_dtype(key, query.dtype)
    check_dtype(value, query.dtype)
    heads, rows = batch * kv_heads, row_count(key)
    params = params or launch.decode_params(heads=heads, rows=rows)
    plan = _Plan(
        reader=TileReader(head_dim, query.dtype, interpret),
        group=group,
        rows=rows,
        tiles_per_split=-(-_tiles(rows) // params.splits),
        scale=scale,
        centred=mean is not None,
    )
    operands = [jnp.stack([first, last], axis=1).astype(jnp.int32), _pad_query(query, heads)]
    specs = [
        pl.BlockSpec((None, 2), lambda split, head: (head // kv_heads, 0)),
        per_head(operands[1]),
    ]
    for rows_of in (key, value):
        for array in flat(rows_of):
            operands.append(array)
            specs.append(per_head(array))
    if mean is not None:
        for array, of_head in _mean_tables(query, mean, rows, heads):
            operands.append(array)
            specs.append(per_head(array) if of_head else pl.BlockSpec(array.shape, lambda split, head: (0,) * 3))
    shapes = [(head_dim,), (), ()]
    out, m, l = triton.pallas_call(  # noqa: E741
        functools.partial(_kernel, plan=plan, packed=(isinstance(key, Packed), isinstance(value, Packed))),
        name="decode_attention",
        num_warps=tile.NUM_WARPS,
        interpret=interpret,
        grid=(params.splits, heads),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, group, head_dim), lambda split, head: (head, split, 0, 0)),
            *[pl.BlockSpec((None, None, group), lambda split, head: (head, split, 0))] * 2,
        ],
        out_shape=[jax.ShapeDtypeStruct((heads, params.splits, group, *s), jnp.float32) for s in shapes],
    )(*operands)
    out, m, l = merge_splits(out, m, l)  # noqa: E741
    leading = (batch, kv_heads, group)
    return out.reshape(*leading, head_dim), m.reshape(leading), l.reshape(leading)


def merge_splits(out: jax.Array, m: jax.Array, l: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:  # noqa: E741
    """Merge unnormalised splits: out [..., splits, G, H], m and l [..., splits, G] -> without the axis of splits."""
    largest = m.max(axis=-2)
    weight = jnp.exp(m - largest[..., None, :])
    return (out * weight[..., None]).sum(axis=-3), largest, (l * weight).sum(axis=-2)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for."""

    reader: TileReader
    group: int
    rows: int
    tiles_per_split: int
    scale: float
    centred: bool


def _kernel(
    range_ref: triton.Ref,  # [2]
    q_ref: triton.Ref,  # [16, H]
    *refs: triton.Ref,
    plan: _Plan,
    packed: tuple[bool, bool],
) -> None:
    """One split of one KV head.

    The other refs: for keys and for values bitmap [S * H / 32] and values [S * slots], or dense rows [S * H]; with a
    mean turn [2, tiles, H / 2], mixed [2, 16, H / 2] and table [2, H / 2, TOKENS]; outputs out [G, H], m [G], l [G].
    """
    reader = plan.reader
    inputs, (out_ref, m_ref, l_ref) = iter(refs[:-3]), refs[-3:]
    key_refs, value_refs = (list(itertools.islice(inputs, 1 + is_packed)) for is_packed in packed)
    mean_refs = list(inputs)
    first, last = range_ref[0], range_ref[1]
    begin = jnp.maximum(pl.program_id(0) * plan.tiles_per_split, first // TOKENS)
    end = jnp.minimum((pl.program_id(0) + 1) * plan.tiles_per_split, -(-last // TOKENS))
    to_log2 = plan.scale * math.log2(math.e)
    query = q_ref[...]

    def attend(i: jax.Array, carry: tuple) -> tuple:  # type: ignore[type-arg]
        m, total, out, memory = carry
        tokens = i * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        seen = (tokens >= first) & (tokens < last)
        columns = tile.token_of_column(tokens)
        seen_columns = (columns >= first) & (columns < last)
        # both at once: the values are in flight while the keys are unpacked
        loaded_key, loaded_value = (
            load_tile(refs[0], refs[1], tokens, seen, head_dim=reader.head_dim, rows=plan.rows) if is_packed else None
            for refs, is_packed in zip((key_refs, value_refs), packed, strict=True)
        )
        if loaded_key:
            memory, scores = reader.times_keys(reader.scatter(memory, *loaded_key), query)
        else:
            scores = triton.dot(query, _dense_keys(key_refs[0], columns, plan))
        if plan.centred:
            scores += _mean_scores(mean_refs, i)
        scores = jnp.where(seen_columns[None, :], scores * to_log2, -jnp.inf)
        m_new = jnp.maximum(m, scores.max(axis=1))
        decay = jnp.exp2(m - m_new)[:, None]
        weights = jnp.exp2(scores - m_new[:, None])
        total = total * decay + weights
        weights, out = weights.astype(reader.dtype), [o * decay for o in out]
        if loaded_value:
            memory, out = reader.times_values(reader.scatter(memory, *loaded_value), weights, out, order="columns")
        else:
            values = _dense_values(value_refs[0], columns, seen_columns, plan)
            out = [o + triton.dot(weights, v) for o, v in zip(out, values, strict=True)]
        return m_new, total, out, memory

    lowest = float(np.finfo(np.float32).min)
    zeros = [jnp.zeros((_QUERY_ROWS, COLUMNS), jnp.float32) for _ in range(reader.head_dim // COLUMNS)]
    total = jnp.zeros((_QUERY_ROWS, TOKENS), jnp.float32)
    start = (jnp.full(_QUERY_ROWS, lowest, jnp.float32), total, zeros, reader.zeros())
    m, total, out, _ = lax.fori_loop(begin, end, attend, start)
    head = jnp.arange(_QUERY_ROWS)
    for group, part in enumerate(out):
        channel = group * COLUMNS + jnp.arange(COLUMNS)
        triton.store(out_ref.at[head[:, None], channel[None, :]], part, mask=(head < plan.group)[:, None])
    triton.store(m_ref.at[head], jnp.maximum(m * math.log(2), lowest), mask=head < plan.group)
    triton.store(l_ref.at[head], total.sum(axis=1), mask=head < plan.group)


def _dense_keys(ref: triton.Ref, tokens: jax.Array, plan: _Plan) -> jax.Array:
    """Keys [H, TOKENS] from dense rows [S * H]."""
    channel = jnp.arange(plan.reader.head_dim, dtype=jnp.int32)[:, None]
    # rows past the end are not seen; the last one is read in their place
    return triton.load(ref.at[jnp.minimum(tokens, plan.rows - 1)[None, :] * plan.reader.head_dim + channel])


def _dense_values(ref: triton.Ref, tokens: jax.Array, seen: jax.Array, plan: _Plan) -> list[jax.Array]:
    """Values [TOKENS, COLUMNS] for each COLUMNS channels, from dense rows [S * H]; zero where not seen."""
    mask = jnp.broadcast_to(seen[:, None], (TOKENS, COLUMNS))
    place = tokens[:, None] * plan.reader.head_dim + jnp.arange(COLUMNS, dtype=jnp.int32)[None, :]
    groups = range(plan.reader.head_dim // COLUMNS)
    return [triton.load(ref.at[place + group * COLUMNS], mask=mask, other=0) for group in groups]


def _mean_tables(query: jax.Array, mean: Mean, rows: int, heads: int) -> list[tuple[jax.Array, bool]]:
    """What `_mean_scores` reads: (array, whether it is per KV head).

    q . R_s m = sum over pairs of a cos(w s) + b sin(w s), where a = q1 m1 + q2 m2 and b = q2 m1 - q1 m2. With s =
    tile start + j the start's angle turns (a, b), and one table of cos(w j) and sin(w j) serves every head and tile.
    """
    q1, q2 = jnp.split(query.astype(jnp.float32), 2, axis=-1)
    m1, m2 = jnp.split(mean.key[:, :, None].astype(jnp.float32), 2, axis=-1)
    a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
    mixed = jnp.stack([_pad_query(x, heads) for x in (a, b)], axis=1)  # [heads, 2, 16, H / 2]
    start = (mean.offset + jnp.arange(_tiles(rows)) * TOKENS)[:, None] * mean.inv_freq
    within = mean.inv_freq[:, None] * tile.token_of_column(jnp.arange(TOKENS))
    turn = jnp.stack([jnp.cos(start), jnp.sin(start)])  # [2, tiles, H / 2]
    table = jnp.stack([jnp.cos(within), jnp.sin(within)])  # [2, H / 2, TOKENS]
    return [(turn, False), (mixed, True), (table, False)]


def _mean_scores(refs: list[triton.Ref], i: jax.Array) -> jax.Array:
    """q . R_s m for a tile's tokens: [16, TOKENS]."""
    turn_ref, mixed_ref, table_ref = refs
    cos, sin = turn_ref[0, i, :], turn_ref[1, i, :]
    a, b = mixed_ref[0], mixed_ref[1]
    turned = (a * cos + b * sin, b * cos - a * sin)
    return triton.dot(turned[0], table_ref[0]) + triton.dot(turned[1], table_ref[1])


def _tiles(rows: int) -> int:
    return -(-rows // TOKENS)


def _pad_query(query: jax.Array, heads: int) -> jax.Array:
    """[B, K, G, n] -> [B * K, 16, n]."""
    padding = [(0, 0), (0, 0), (0, _QUERY_ROWS - query.shape[2]), (0, 0)]
    return jnp.pad(query, padding).reshape(heads, _QUERY_ROWS, query.shape[3])
