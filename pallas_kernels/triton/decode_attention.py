"""Split-K flash decoding over packed keys and values, or over either of them dense, and over the tokens not packed."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.backend import Attended
from mustafar_jax.operands import Mean, PackedAttention
from mustafar_jax.pallas_kernels.rows import check_rows, check_tail
from mustafar_jax.pallas_kernels.triton import codes, launch, tile
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.coded_attention import attend_codes
from mustafar_jax.pallas_kernels.triton.mean import Centre
from mustafar_jax.pallas_kernels.triton.merge import merge
from mustafar_jax.pallas_kernels.triton.rows import attend_by_split, flat, load_tile, per_head
from mustafar_jax.pallas_kernels.triton.tile import COLUMNS, ROWS, TOKENS, Rotations, TileReader
from mustafar_jax.rows import Rows


def decode_attention(
    operands: PackedAttention, *, params: launch.DecodeParams | None = None, interpret: bool = False
) -> Attended:
    """Attend the last token of each sequence to the sequence: its sinks, its packed rows, its recent tokens.

    For the packed rows, each block of 128 threads takes 128 tokens at a time (`tile`; `coded_attention` where they are
    codes), decodes each KV head once for all of its query heads and multiplies on the tensor cores. Tiles without a
    visible row are skipped. A second kernel (`merge`) merges the blocks' results and attends the rest.

    Args:
        operands: of one dtype; keys and values plain numbers, each with a bitmap or without, or both of them codes
            without one; 1 to 16 query heads per KV head.
        params: launch parameters; tuned ones for this device, or a heuristic, if None.
        interpret: run as plain JAX, anywhere.

    Returns:
        [B, K, G, H] of the query's dtype; zeros where nothing is visible. Where `operands.return_lse` that and the
        log-sum-exp of the scores, float32 [B, K, G], -inf where nothing is visible.

    Raises:
        NotImplementedError: see `language.check_supported` and `why_not_rows`; also for values or keys of another dtype
            than the query's, and for other codes.
        ValueError: keys and values of which there are not as many.

    Source: FlashDecoding (pytorch.org/blog/flash-decoding); the format of arXiv 2505.22913.
    """
    query, key, value, tail = operands.query, operands.key, operands.value, operands.tail
    tl.check_supported(dtype=query.dtype, head_dim=query.shape[3], queries_per_head=query.shape[2])
    check_rows(key, value, query.dtype, codes.WHOLE, codes.WHOLE)
    if reason := why_not_rows(key, value):
        raise NotImplementedError(reason)
    check_tail(tail, query.dtype)
    lengths, last, scale = operands.lengths, operands.packed_lengths, operands.scale
    splits = []
    if key.padded_length:
        first = tail.first_row(lengths, operands.window)
        splits = attend_rows(
            query,
            key,
            value,
            first,
            last,
            scale=scale,
            mean=operands.mean,
            turned_keys=operands.turned_keys,
            params=params,
            interpret=interpret,
        )
    return merge(
        query,
        splits,
        tail,
        lengths,
        last,
        scale=scale,
        window=operands.window,
        turned=operands.turned_values,
        return_lse=operands.return_lse,
        interpret=interpret,
    )


def why_not_rows(key: Rows, value: Rows) -> str | None:
    """Why keys and values, each of which could be attended, cannot be together, in words, or None."""
    if key.is_plain == value.is_plain:
        return None
    given = f"keys of {key.codec.name} and values of {value.codec.name}"
    return f"the Triton kernels want both keys and values in codes, or neither; got {given}"


def attend_rows(
    query: jax.Array,
    key: Rows,
    value: Rows,
    first: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    mean: Mean | None = None,
    turned_keys: bool = False,
    params: launch.DecodeParams | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Attend to the rows first <= row < last of each sequence, in splits.

    Args:
        query, key, value, scale, mean, turned_keys, params, interpret: as in `decode_attention`.
        first, last: int32 [B]; a sequence with last <= first sees nothing.

    Returns:
        Float32 out [B * K, splits, G, H], m and l [B * K, splits, G]: unnormalised sums, the largest score (of
        codes, one that is among the largest; the lowest float32 where nothing was visible), the sum of exp(score - m).
    """
    batch, kv_heads, group, head_dim = query.shape
    heads, rows = batch * kv_heads, key.padded_length
    params = params or launch.decode_params(heads=heads, rows=rows)
    if not key.is_plain:
        return attend_codes(
            query,
            key,
            value,
            first,
            last,
            scale=scale,
            mean=mean,
            turned_keys=turned_keys,
            params=params,
            interpret=interpret,
        )
    plan = _Plan(
        reader=TileReader(head_dim, query.dtype, interpret),
        group=group,
        rows=rows,
        tiles_per_split=-(-_tiles(rows) // params.splits),
        scale=scale,
        centred=mean is not None and key.bitmap is not None,
    )
    operands = [first[:, None], last[:, None], query.reshape(heads, group, head_dim)]
    of_sequence = pl.BlockSpec((None, 1), lambda split, head: (head // kv_heads, 0))
    specs = [of_sequence, of_sequence, per_head(operands[2])]
    for rows_of in (key, value):
        for array in flat(rows_of):
            operands.append(array)
            specs.append(per_head(array))
    if plan.centred:
        assert mean is not None
        tables = [jnp.asarray(x) for x in plan.centre.tables(mean, params.splits)]
        operands += [mean.key.astype(jnp.float32).reshape(heads, head_dim), *tables]
        specs += [per_head(operands[-3]), *(pl.BlockSpec(x.shape, lambda split, head: (0,)) for x in tables)]
    kernel = functools.partial(_kernel, plan=plan, packed=(key.bitmap is not None, value.bitmap is not None))
    return attend_by_split(
        kernel, operands, specs, name="decode_attention", splits=params.splits, queries=operands[2], interpret=interpret
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for."""

    reader: TileReader
    group: int
    rows: int
    tiles_per_split: int
    scale: float
    centred: bool

    @property
    def centre(self) -> Centre:
        """How the mean is multiplied, where keys are centred."""
        return Centre(self.reader, Rotations.of(self.group), self.group, self.tiles_per_split)


def _kernel(
    first_ref: tl.Ref,  # [1]
    last_ref: tl.Ref,  # [1]
    q_ref: tl.Ref,  # [G, H]
    *refs: tl.Ref,
    plan: _Plan,
    packed: tuple[bool, bool],
) -> None:
    """One split of one KV head.

    The other refs: for keys and for values bitmap [S * H / 32] and values [S * slots / 2], or dense rows [S * H]; where
    keys are centred mean [H] and `Centre.tables`; outputs out [G, H], m [G], l [G].
    """
    reader = plan.reader
    inputs, (out_ref, m_ref, l_ref) = iter(refs[:-3]), refs[-3:]
    key_refs, value_refs = (list(itertools.islice(inputs, 1 + is_packed)) for is_packed in packed)
    mean_refs = list(inputs)
    first, last = first_ref[0], last_ref[0]
    start = pl.program_id(0) * plan.tiles_per_split
    begin = jnp.maximum(start, first // TOKENS)
    end = jnp.minimum(start + plan.tiles_per_split, -(-last // TOKENS))
    to_log2 = plan.scale * math.log2(math.e)
    query, mean_query = _operands(q_ref, mean_refs, plan, paired=packed[0])
    ones = jnp.ones((TOKENS, COLUMNS), reader.dtype)

    def attend(i: jax.Array, carry: tuple) -> tuple:  # type: ignore[type-arg]
        m, total, out, memory = carry
        tokens = i * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        seen = (tokens >= first) & (tokens < last)
        columns = tile.token_of_column(tokens)
        seen_columns = (columns >= first) & (columns < last)
        load = functools.partial(load_tile, tokens=tokens, seen=seen, head_dim=reader.head_dim, rows=plan.rows)
        if packed[0]:
            memory = reader.scatter(memory, load(*key_refs))
            of_mean = reader.no_scores()
            if plan.centred:
                of_mean = reader.times_table(mean_query, mean_refs[2], i - start, plan.centre.rotations)
            memory, scores = reader.times_keys(memory, query, of_mean)
        else:
            scores = tl.dot(query, _dense_keys(key_refs[0], columns, plan))
        scores = jnp.where(seen_columns[None, :], scores * to_log2, -jnp.inf)
        m_new = jnp.maximum(m, scores.max(axis=1))
        decay = jnp.exp2(m - m_new)[:, None]
        # sooner they would, beside centred keys' products, take registers that cost a block per multiprocessor
        values = load(*value_refs) if packed[1] else None
        weights = jnp.exp2(scores - m_new[:, None])
        weights, out = weights.astype(reader.dtype), [o * decay for o in out]
        total = total * decay + tl.dot(weights, ones)
        if values:
            memory = reader.scatter(memory, values)
            memory, out = reader.times_values(memory, weights, out, order="columns")
        else:
            parts = _dense_values(value_refs[0], columns, seen_columns, plan)
            out = [o + tl.dot(weights, v) for o, v in zip(out, parts, strict=True)]
        return m_new, total, out, memory

    lowest = float(np.finfo(np.float32).min)
    zeros = [jnp.zeros((ROWS, COLUMNS), jnp.float32) for _ in range(reader.head_dim // COLUMNS)]
    total = jnp.zeros((ROWS, COLUMNS), jnp.float32)
    carry = (jnp.full(ROWS, lowest, jnp.float32), total, zeros, reader.zeros())
    m, total, out, _ = lax.fori_loop(begin, end, attend, carry)
    head = jnp.arange(ROWS)
    for group, part in enumerate(out):
        channel = group * COLUMNS + jnp.arange(COLUMNS)
        tl.store(out_ref.at[head[:, None], channel[None, :]], part, mask=(head < plan.group)[:, None])
    tl.store(m_ref.at[head], jnp.maximum(m * math.log(2), lowest), mask=head < plan.group)
    tl.store(l_ref.at[head], total.max(axis=1), mask=head < plan.group)


def _operands(q_ref: tl.Ref, mean_refs: list[tl.Ref], plan: _Plan, *, paired: bool) -> tuple[jax.Array, jax.Array]:
    """What multiplies keys, and what multiplies the mean's table: one operand where its rows suffice.

    The compiler keeps one in registers; two it would read from shared memory for every tile.
    """
    query = _load_query(q_ref, plan, paired=paired)
    if not plan.centred:
        return query, query
    rotations = plan.centre.rotations
    mean_query = plan.centre.query(q_ref, *mean_refs[:2]).astype(plan.reader.dtype)
    if rotations.rows == ROWS:
        return query, mean_query
    is_mean = jnp.arange(ROWS)[:, None] >= ROWS - rotations.rows
    both = jnp.where(is_mean, mean_query, query)
    return both, both


def _load_query(ref: tl.Ref, plan: _Plan, *, paired: bool) -> jax.Array:
    """Queries [ROWS, H], rows from G on zero; the columns in the order of `tile.channel_of_row` if paired."""
    head, channel = jnp.arange(ROWS)[:, None], jnp.arange(plan.reader.head_dim)
    channel = tile.channel_of_row(channel, plan.reader.head_dim) if paired else channel
    mask = jnp.broadcast_to(head < plan.group, (ROWS, plan.reader.head_dim))
    return tl.load(ref.at[head, channel[None, :]], mask=mask, other=0)


def _dense_keys(ref: tl.Ref, tokens: jax.Array, plan: _Plan) -> jax.Array:
    """Keys [H, TOKENS] from dense rows [S * H]."""
    channel = jnp.arange(plan.reader.head_dim, dtype=jnp.int32)[:, None]
    # rows past the end are not seen; the last one is read in their place
    return tl.load(ref.at[jnp.minimum(tokens, plan.rows - 1)[None, :] * plan.reader.head_dim + channel])


def _dense_values(ref: tl.Ref, tokens: jax.Array, seen: jax.Array, plan: _Plan) -> list[jax.Array]:
    """Values [TOKENS, COLUMNS] for each COLUMNS channels, from dense rows [S * H]; zero where not seen."""
    mask = jnp.broadcast_to(seen[:, None], (TOKENS, COLUMNS))
    place = tokens[:, None] * plan.reader.head_dim + jnp.arange(COLUMNS, dtype=jnp.int32)[None, :]
    groups = range(plan.reader.head_dim // COLUMNS)
    return [tl.load(ref.at[place + group * COLUMNS], mask=mask, other=0) for group in groups]


def _tiles(rows: int) -> int:
    return -(-rows // TOKENS)
