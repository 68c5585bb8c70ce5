"""Split-K flash decoding over packed keys and values on Hopper GPUs, through Pallas Mosaic GPU.

Each warp works alone on 32 tokens at a time, a unit: it holds one tile in shared memory, into which it scatters the
keys' entries and, once their product is taken, the values'. docs/kernels.md draws the tile and says who owns what.

Lanes stand for tokens while entries are scattered. In matrix products (`products`) lane 4 g + t holds what
`Warp.multiply_add` says; g and t below are these two.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.backend import Attended
from mustafar_jax.layout import WORD
from mustafar_jax.operands import Mean, PackedAttention
from mustafar_jax.pallas_kernels.mosaic import codes, launch, lowering
from mustafar_jax.pallas_kernels.mosaic.mean import MeanKey, middles, turns
from mustafar_jax.pallas_kernels.mosaic.merge import merge
from mustafar_jax.pallas_kernels.mosaic.merge_warps import merge_warps
from mustafar_jax.pallas_kernels.mosaic.plan import MOST_UNITS, TOKENS, Layout, Places, Plan, State, layout
from mustafar_jax.pallas_kernels.mosaic.products import LOWEST, clear_tile, products
from mustafar_jax.pallas_kernels.mosaic.sides import keys_of, values_of
from mustafar_jax.pallas_kernels.mosaic.sources import smaller, source
from mustafar_jax.pallas_kernels.mosaic.staged import Staged
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp
from mustafar_jax.pallas_kernels.rows import check_rows, check_tail, is_dense
from mustafar_jax.rows import Rows

BOTH_DENSE = "the Mosaic GPU kernels want keys or values pruned or coded; here both are ordinary arrays"


def decode_attention(
    operands: PackedAttention, *, params: launch.MosaicParams | None = None, interpret: bool = False
) -> Attended:
    """Attend the last token of each sequence to the sequence: its sinks, its packed rows, its recent tokens.

    The packed rows are attended here; `merge`, a second kernel, merges the blocks' results and attends the rest.

    Args:
        operands: of one dtype; keys and values each plain numbers, with a bitmap or without, or codes without one, but
            not both plain numbers without one; 1 to 16 query heads per KV head.
        params: launch parameters; a heuristic if None.
        interpret: run as numpy and plain JAX, anywhere.

    Returns:
        [B, K, G, H] of the query's dtype; zeros where nothing is visible. Where `operands.return_lse` that and the
        log-sum-exp of the scores, float32 [B, K, G], -inf where nothing is visible.

    Raises:
        NotImplementedError: see `lowering.check_supported`; also for plain rows without a bitmap on both sides, for
            rows of another dtype than the query's, and for other codes.
        ValueError: keys and values of which there are not as many.

    Source: FlashDecoding (pytorch.org/blog/flash-decoding); the format of arXiv 2505.22913.
    """
    query, tail, lengths, last = operands.query, operands.tail, operands.lengths, operands.packed_lengths
    check_tail(tail, query.dtype)
    first, scale = tail.first_row(lengths, operands.window), operands.scale
    splits = attend_rows(
        query,
        operands.key,
        operands.value,
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
    params: launch.MosaicParams | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Attend to the rows first <= row < last of each sequence, in splits.

    Args:
        query, key, value, scale, mean, turned_keys, params, interpret: as in `decode_attention`.
        first, last: int32 [B], at least 0; a sequence with last <= first sees nothing.

    Returns:
        Float32 out [B * K, splits, G, H], m and l [B * K, splits, G]: unnormalised sums, a score that is among the
        largest (the lowest float32 where nothing was visible) and the sum of exp(score - m). No splits if there are no
        rows.
    """
    batch, kv_heads, group, head_dim = query.shape
    lowering.check_supported(dtype=query.dtype, head_dim=head_dim, queries_per_head=group)
    check_rows(key, value, query.dtype, codes.KEYS, codes.WHOLE)
    if is_dense(key) and is_dense(value):
        raise NotImplementedError(BOTH_DENSE)
    heads, rows = batch * kv_heads, key.padded_length
    if rows == 0:
        return []
    of_key, of_value = layout(key), layout(value)
    fast_pairs = mean.fast_pairs if mean is not None and not is_dense(key) else 0
    slow = 0 < fast_pairs < head_dim // 2
    params = params or _params(heads, rows, group, head_dim, (of_key, of_value), centred=fast_pairs > 0, slow=slow)
    plan = Plan(
        head_dim=head_dim,
        group=group,
        kv_heads=kv_heads,
        rows=rows,
        key=of_key,
        value=of_value,
        splits=params.splits,
        warps=params.warps,
        scale=scale * math.log2(math.e),
        fast_pairs=fast_pairs,
        turned_keys=turned_keys,
    )
    arrays = [first.astype(jnp.int32), last.astype(jnp.int32), query]
    arrays += [x for side in (key, value) for x in (side.bitmap, side.payload, side.scale) if x is not None]
    if plan.centred:
        assert mean is not None
        arrays += [mean.key.astype(jnp.float32), jnp.asarray(mean.table(functools.partial(turns, plan=plan)))]
        arrays += [jnp.asarray(mean.table(functools.partial(middles, plan=plan)))] if plan.slow_pairs else []
    shapes = [(head_dim,), (), ()]
    return lowering.kernel_call(
        functools.partial(attend_split, plan=plan),
        *(x.reshape(-1) for x in arrays),
        out_shape=[jax.ShapeDtypeStruct((heads, params.splits, group, *s), jnp.float32) for s in shapes],
        blocks=heads * params.splits,
        warps=params.warps,
        shared_bytes=plan.shared_bytes,
        dtype=query.dtype,
        interpret=interpret,
        teams=params.teams,
    )


def _params(
    heads: int, rows: int, group: int, head_dim: int, sides: tuple[Layout, Layout], *, centred: bool, slow: bool
) -> launch.MosaicParams:
    """A heuristic's; where a mean has slow pairs, with no more units in a block than memory has room for."""
    if any(side.bits for side in sides):
        direct = all(side.is_direct for side in sides)
        words = sum(side.bits for side in sides) * head_dim // WORD if direct else None
        params = launch.coded_params(
            heads=heads, rows=rows, group=group, head_dim=head_dim, words=words, centred=centred
        )
    else:
        slots = sum(side.slots or 2 * head_dim for side in sides)
        params = launch.mosaic_params(heads=heads, rows=rows, group=group, slots=slots)
    fewest = -(-rows // (TOKENS * MOST_UNITS // params.teams)) if slow else 1
    return dataclasses.replace(params, splits=max(params.splits, fewest))


def attend_split(w: Warp, shared: Register, *refs: Any, plan: Plan) -> None:
    """One split of one KV head: a block, whose warps take every `warps`-th unit.

    refs: first and last int32 [B], query [B, K, G, H], bitmap and values of keys, of values, or either's dense rows;
    where keys are centred mean [B, K, H], its `turns` and `middles`;
    out [heads, splits, G, H], m and l [heads, splits, G].
    """
    firsts, lasts, query, *inputs, out, m, l = refs  # noqa: E741
    block = w.block()
    head, split = block // plan.splits, block % plan.splits
    at = Places.of(w, shared, plan)
    key, value = (source(w, inputs, head, side, plan) for side in (plan.key, plan.value))
    staged = Staged(w, query, inputs[0] if plan.centred else None, head, at, plan)
    first, last = (w.load(x, (head // plan.kv_heads) << 2, 1)[0] for x in (firsts, lasts))
    last = smaller(w, last, w.integer(plan.rows))
    begin = split * plan.units_per_split
    end = smaller(w, begin + plan.units_per_split, (last + (TOKENS - 1)) >> 5)
    begin = _larger(w, begin, first >> 5) + w.warp()
    # in flight while the rest is made ready
    loaded = [
        x for rows in (key, value) for load in (rows.load, rows.load_scales) for x in load(w, begin, at, begin < end)
    ]
    multiply = products(w, at, plan)
    mean = MeanKey(w, inputs[1:], at, plan) if plan.centred else None
    staged.share()
    keys = keys_of(key, multiply, mean, end, w, at, plan)
    values = values_of(value, multiply, w, at, plan)
    if plan.has_tile:
        clear_tile(w, at, plan)
    state = State.empty(w, LOWEST, plan)

    def seen_of(token: Register) -> Register:
        return w.select(token < first, w.integer(0), w.select(token < last, w.integer(1), w.integer(0))) > 0

    def attend_unit(unit: Register, carry: list[Register]) -> list[Register]:
        of_key, of_value = carry[: key.registers], carry[key.registers : len(loaded)]
        state = State.from_flat(carry[len(loaded) :], plan)
        turn = mean.load_turn(unit) if mean else []
        seen, ahead = seen_of(unit * TOKENS + at.lane), unit + plan.warps
        taken = keys.take(of_key, unit, seen)
        next_key = key.load(w, ahead, at, ahead < end)
        if mean:
            mean.turn_queries(turn)
        w.sync_warp()
        scores = keys.scores(taken, unit)
        next_key += key.load_scales(w, ahead, at, ahead < end)  # not before: those of the unit are needed until here
        w.sync_warp()
        weights = multiply.weigh(state, scores, unit, seen_of, values.scales(of_value))
        values.take(of_value, state, weights, unit, seen)
        next_value = value.load(w, ahead, at, ahead < end) + value.load_scales(w, ahead, at, ahead < end)
        w.sync_warp()
        values.add(state, weights)
        w.sync_warp()
        return [*next_key, *next_value, *state.flat()]

    carry = w.loop(begin, end, plan.warps, [*loaded, *state.flat()], attend_unit)
    state = State.from_flat(carry[len(loaded) :], plan)
    multiply.publish(state)
    w.sync_block()
    merge_warps(w, shared, out, m, l, plan)


def _larger(w: Warp, a: Register, b: Register) -> Register:
    return w.select(a < b, b, a)
