"""Split-K flash decoding over packed keys and values on Hopper GPUs, through Pallas Mosaic GPU.

Each warp works alone on 32 tokens at a time, a unit: it holds one tile in shared memory, into which it scatters the
keys' entries and, once their product is taken, the values'. docs/kernels.md draws the tile and says who owns what.

Lanes stand for tokens while entries are scattered and scores become weights. In matrix products lane 4 g + t holds
what `Warp.multiply_add` says; g and t below are these two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.pallas_kernels import launch, mosaic_gpu
from mustafar_jax.pallas_kernels.merge import merge
from mustafar_jax.pallas_kernels.mosaic_plan import ROW, TOKENS, Places, Plan, layout
from mustafar_jax.pallas_kernels.rows import Mean, Packed, Rows, Tail, check_rows, row_count
from mustafar_jax.pallas_kernels.sources import smaller, source
from mustafar_jax.pallas_kernels.warp import LANES, Register, Warp

_SLACK = 8.0
"""How far scores, to base 2, may exceed the one that weights are relative to, before all sums are rescaled."""
_LOWEST = float(np.finfo(np.float32).min)


def decode_attention(
    query: jax.Array,
    key: Rows,
    value: Rows,
    tail: Tail,
    lengths: jax.Array,
    packed_lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    mean: Mean | None = None,
    params: launch.MosaicParams | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend the last token of each sequence to the sequence: its sinks, its packed rows, its recent tokens.

    The packed rows are attended here; `merge`, a Triton kernel, merges the blocks' results and attends the rest.

    Args:
        query, tail, lengths, packed_lengths, scale, window: as in `decode_attention.decode_attention`.
        key, value: rows [B, K, S, H] of the query's dtype, at least one of them packed; what is not visible may hold
            anything.
        mean: where keys are centred, what stands for the entries that they do not hold.
        params: launch parameters; a heuristic if None.
        interpret: run as numpy and plain JAX, anywhere.

    Returns:
        [B, K, G, H] of the query's dtype; zeros where nothing is visible.

    Raises:
        NotImplementedError: see `mosaic_gpu.check_supported`; also for dense keys with dense values, and for
            rows of another dtype than the query's.
        ValueError: keys and values of which there are not as many.

    Source: FlashDecoding (pytorch.org/blog/flash-decoding); the format of arXiv 2505.22913.
    """
    check_rows(tail.key, tail.value, query.dtype)
    first = tail.first_row(lengths, window)
    splits = attend_rows(
        query, key, value, first, packed_lengths, scale=scale, mean=mean, params=params, interpret=interpret
    )
    return merge(query, splits, tail, lengths, packed_lengths, scale=scale, window=window, interpret=interpret)


def attend_rows(
    query: jax.Array,
    key: Rows,
    value: Rows,
    first: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    mean: Mean | None = None,
    params: launch.MosaicParams | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Attend to the rows first <= row < last of each sequence, in splits.

    Args:
        query, key, value, scale, mean, params, interpret: as in `decode_attention`.
        first, last: int32 [B], at least 0; a sequence with last <= first sees nothing.

    Returns:
        Float32 out [B * K, splits, G, H], m and l [B * K, splits, G]: unnormalised sums, a score that is among the
        largest (the lowest float32 where nothing was visible) and the sum of exp(score - m). No splits if there are no
        rows.
    """
    batch, kv_heads, group, head_dim = query.shape
    mosaic_gpu.check_supported(dtype=query.dtype, head_dim=head_dim, queries_per_head=group)
    check_rows(key, value, query.dtype)
    if not isinstance(key, Packed) and not isinstance(value, Packed):
        raise NotImplementedError("the Mosaic GPU kernels want packed keys or packed values; both are dense")
    heads, rows = batch * kv_heads, row_count(key)
    if rows == 0:
        return []
    params = params or launch.mosaic_params(heads=heads, rows=rows)
    plan = Plan(
        head_dim=head_dim,
        group=group,
        kv_heads=kv_heads,
        rows=rows,
        key=layout(key),
        value=layout(value),
        splits=params.splits,
        warps=params.warps,
        scale=scale * math.log2(math.e),
        centred=mean is not None and isinstance(key, Packed),
    )
    arrays = [first.astype(jnp.int32), last.astype(jnp.int32), query, *jax.tree.leaves((key, value))]
    if plan.centred:
        assert mean is not None
        arrays += [mean.key.astype(jnp.float32), _turns(mean, plan)]
    shapes = [(head_dim,), (), ()]
    return mosaic_gpu.kernel_call(
        functools.partial(attend_split, plan=plan),
        *(x.reshape(-1) for x in arrays),
        out_shape=[jax.ShapeDtypeStruct((heads, params.splits, group, *s), jnp.float32) for s in shapes],
        blocks=heads * params.splits,
        warps=params.warps,
        shared_bytes=params.warps * plan.warp_bytes,
        dtype=query.dtype,
        interpret=interpret,
    )


def _turns(mean: Mean, plan: Plan) -> jax.Array:
    """Cosines and sines of turns [units + 11, pairs, 2]: to each unit's first token; to a unit's 8 quads; 3 steps.

    They are the same for every layer of a model, whose compiler keeps one.
    """
    starts = mean.offset + np.arange(plan.units) * TOKENS
    steps = [4 * quad for quad in range(8)] + [1, 16, plan.warps * TOKENS]
    angle = jnp.asarray(np.concatenate([starts, steps]), jnp.float32)[:, None] * mean.inv_freq
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@dataclasses.dataclass
class State:
    """Softmax so far, in registers.

    Attributes:
        m: a score of each head, the same in all lanes, that none so far exceeds by more than `_SLACK`.
        l: this lane's sum of weights of each head.
        out: sums [pairs / 8][octets][4], a product's accumulators: see `add_values`.
    """

    m: list[Register]
    l: list[Register]  # noqa: E741
    out: list[list[list[Register]]]

    def flat(self) -> list[Register]:
        """All registers in order."""
        return [*self.m, *self.l, *(x for block in self.out for part in block for x in part)]

    @staticmethod
    def from_flat(registers: list[Register], plan: Plan) -> "State":
        """The inverse of `flat`."""
        m, l, rest = registers[: plan.group], registers[plan.group : 2 * plan.group], registers[2 * plan.group :]  # noqa: E741
        parts = [rest[i : i + 4] for i in range(0, len(rest), 4)]
        return State(m, l, [parts[i : i + plan.octets] for i in range(0, len(parts), plan.octets)])


def attend_split(w: Warp, shared: Register, *refs: Any, plan: Plan) -> None:
    """One split of one KV head: a block, whose warps take every `warps`-th unit.

    refs: first and last int32 [B], query [B, K, G, H], bitmap and values of keys, of values, or either's dense rows;
    where keys are centred mean [B, K, H] and turns (`_turns`); out [heads, splits, G, H], m and l [heads, splits, G].
    """
    firsts, lasts, query, *inputs, out, m, l = refs  # noqa: E741
    block = w.block()
    head, split = block // plan.splits, block % plan.splits
    key, value = (source(w, inputs, head, side, plan) for side in (plan.key, plan.value))
    first, last = (w.load(x, (head // plan.kv_heads) << 2, 1)[0] for x in (firsts, lasts))
    last = smaller(w, last, w.integer(plan.rows))
    begin = split * plan.units_per_split
    end = smaller(w, begin + plan.units_per_split, (last + (TOKENS - 1)) >> 5)
    begin = _larger(w, begin, first >> 5) + w.warp()
    at = Places.of(w, shared, plan)
    # in flight while the rest is made ready
    loaded = [x for rows in (key, value) for x in rows.load(w, begin, at, begin < end)]
    fragments = load_query(w, query, head, at, plan)
    mean: list[Register] = []
    if plan.centred:
        mean_key, turns = inputs
        mean = begin_mean(w, mean_key, turns, head, begin, begin < end, at, plan)
    else:
        clear_tile(w, at, plan)
    state = State(
        [w.number(_LOWEST)] * plan.group,
        [w.number(0)] * plan.group,
        [[[w.number(0)] * 4 for _ in range(plan.octets)] for _ in range(plan.pairs // 8)],
    )

    def attend_unit(unit: Register, carry: list[Register]) -> list[Register]:
        state = State.from_flat(carry[key.registers + value.registers + len(mean) :], plan)
        next_mean = carry[key.registers + value.registers :][: len(mean)]
        if plan.centred:
            next_mean = fill_tile(w, next_mean, at, plan)
        token = unit * TOKENS + at.lane
        seen = w.select(token < first, w.integer(0), w.select(token < last, w.integer(1), w.integer(0))) > 0
        ahead = unit + plan.warps
        key.unpack(w, carry, unit, seen, at, plan)
        next_key = key.load(w, ahead, at, ahead < end)
        w.sync_warp()
        multiply_keys(w, fragments, at, plan)
        w.sync_warp()
        weigh(w, state, seen, at, plan)
        value.unpack(w, carry[key.registers :], unit, seen, at, plan)
        next_value = value.load(w, ahead, at, ahead < end)
        w.sync_warp()
        add_values(w, state, at, plan)
        w.sync_warp()
        return [*next_key, *next_value, *next_mean, *state.flat()]

    carry = w.loop(begin, end, plan.warps, [*loaded, *mean, *state.flat()], attend_unit)
    state = State.from_flat(carry[len(loaded) + len(mean) :], plan)
    publish(w, state, at, plan)
    w.sync_block()
    merge_warps(w, shared, out, m, l, plan)


def _larger(w: Warp, a: Register, b: Register) -> Register:
    return w.select(a < b, b, a)


def load_query(w: Warp, query: Any, head: Register, at: Places, plan: Plan) -> list[list[list[Register]]]:
    """The queries as `multiply_keys` wants them: [octets][steps of 8 pairs][2].

    Lane (g, t) holds head g % 2 of heads 2 n, 2 n + 1 with n = (t - g / 2) % 4, at pairs 8 step + t and 8 step + 4 + t.
    """
    row = w.row(query, head, plan.group * plan.head_dim * 2)
    odd = (at.t & 1) > 0
    fragments = []
    for octet in range(plan.octets):
        number = at.pair_of_heads * 2 + (at.g & 1) + 8 * octet
        there = number < plan.group
        start = number * (plan.head_dim * 2) + ((at.t >> 1) << 2)
        words = []
        for pair in range(0, plan.pairs, 4):  # channels pair + t and pair + t + pairs, each with a neighbour
            low, high = (w.load(row, start, 1, 2 * (pair + i * plan.pairs), where=there)[0] for i in range(2))
            word = w.select(odd, w.pick_halves(low, high, 1), w.pick_halves(low, high, 0))
            words.append(w.select(there, word, w.integer(0)))
        fragments.append([words[i : i + 2] for i in range(0, len(words), 2)])
    return fragments


def clear_tile(w: Warp, at: Places, plan: Plan) -> None:
    """Fill the tile with zeros."""
    zeros = [w.integer(0)] * 4
    for start in range(0, plan.tile_bytes, 16 * LANES):
        w.store_shared(at.tile + (at.lane << 4), zeros, start)
    w.sync_warp()


def rotate(pair: list[Register], turn: list[Register]) -> list[Register]:
    """Channels (p, p + pairs) turned by an angle, given as cosine and sine."""
    (x, y), (cos, sin) = pair, turn
    return [x * cos - y * sin, y * cos + x * sin]


def begin_mean(
    w: Warp, mean: Any, turns: Any, head: Register, unit: Register, where: Register, at: Places, plan: Plan
) -> list[Register]:
    """What `fill_tile` wants for the first unit; leaves the steps [pairs, 8] in shared memory.

    A pair's steps are the turns by 1 token, 16 tokens and to the warp's next unit. A lane fills quads t and t + 4 of
    pairs 8 i + g, t + 4 first where g is odd, so that the 8 lanes of a phase meet all banks.
    """

    def turn(row: Register, pair: Register) -> list[Register]:
        return [w.as_float(x) for x in w.load(turns, (row * plan.pairs + pair) << 3, 2, where=where)]

    for start in range(0, plan.pairs, LANES):
        pair = at.lane + start
        for i in range(3):
            w.store_shared(at.steps + (pair << 5), turn(w.integer(plan.units + 8 + i), pair), 8 * i)
    w.sync_warp()
    row = w.row(mean, head, plan.head_dim * 4)
    registers = []
    for block in range(plan.pairs // 8):
        pair = at.g + 8 * block
        channels = [w.as_float(w.load(row, (pair + i * plan.pairs) << 2, 1, where=where)[0]) for i in range(2)]
        channels = rotate(channels, turn(unit, pair))
        registers += rotate(channels, turn(at.first_quad + plan.units, pair))
    return registers


def fill_tile(w: Warp, mean: list[Register], at: Places, plan: Plan) -> list[Register]:
    """Fill the tile with the mean key, rotated to each token's position.

    By the angle addition theorems x(s + 1) = 2 cos(w) x(s) - x(s - 1): one multiply-add per channel and token.

    Args:
        w: the warp.
        mean: float32 [pairs / 8][2], the mean's channels (p, p + pairs), at the first token that this lane fills.
        at: its places.
        plan: the plan.

    Returns:
        The same for the warp's next unit.
    """
    backwards = (at.g & 1) > 0
    ahead = []
    for block in range(plan.pairs // 8):
        steps = at.steps + (at.g << 5)
        words = w.load_shared(steps, 4, 256 * block) + w.load_shared(steps, 2, 256 * block + 16)
        one, sixteen, unit = ([w.as_float(x) for x in words[i : i + 2]] for i in (0, 2, 4))
        sixteen[1] = w.select(backwards, w.number(0) - sixteen[1], sixteen[1])
        first = mean[2 * block : 2 * block + 2]
        for quad, start in ((at.first_quad, first), (at.first_quad ^ 4, rotate(first, sixteen))):
            tokens = [start, rotate(start, one)]
            for _ in range(2):
                tokens.append([one[0] * 2.0 * b - a for a, b in zip(*tokens[-2:], strict=True)])
            place = at.tile + at.g * ROW + (quad << 4)
            w.store_shared(place, [w.pack_pair(*pair) for pair in tokens], 8 * block * ROW)
        ahead += rotate(first, unit)
    w.sync_warp()
    return ahead


def multiply_keys(w: Warp, fragments: list[list[list[Register]]], at: Places, plan: Plan) -> None:
    """Multiply the queries with the tile of keys, empty it, and leave parts of scores in shared memory.

    A product's 16 rows are tokens, its inner axis 8 pairs of channels, its columns (class j, head) = 2 j + head for 4
    classes and 2 heads. A lane reads four neighbouring tokens, quad (g + 2 t) % 8, of one pair, so that the 8 lanes of
    a phase meet all banks. A row thus mixes the quads of 4 classes of pairs; the queries are zero but for one class in
    each column, which keeps them apart. The part of (head, class t) for quad n goes to word 4 n of scores[head][t].
    """
    read = at.tile + at.t * ROW + (((at.g + at.t * 2) & 7) << 4)
    zeros = [w.integer(0)] * 4
    for octet, steps in enumerate(fragments):
        heads = range(8 * octet, min(plan.group, 8 * octet + 8), 2)
        even = [[w.number(0)] * 4 for _ in heads]  # of each two heads, tokens 0 and 1 of a quad
        odd = [[w.number(0)] * 4 for _ in heads]  # tokens 2 and 3
        for step, operand in enumerate(steps):
            starts = [8 * step * ROW, (8 * step + 4) * ROW]
            low, high = (w.load_shared(read, 4, start) for start in starts)
            if octet == plan.octets - 1:
                for start in starts:
                    w.store_shared(read, zeros, start)
            for n in range(len(heads)):
                columns = (
                    operand if len(heads) == 1 else [w.select(at.pair_of_heads == n, x, zeros[0]) for x in operand]
                )
                even[n] = w.multiply_add([low[0], low[1], high[0], high[1]], columns, even[n])
                odd[n] = w.multiply_add([low[2], low[3], high[2], high[3]], columns, odd[n])
        for n, head in enumerate(heads):
            quad = (at.g + ((at.t + n) & 3) * 2) & 7
            place = at.scores + at.t * ROW + (quad << 4)
            for i in range(min(2, plan.group - head)):
                part = [even[n][i], even[n][i + 2], odd[n][i], odd[n][i + 2]]
                w.store_shared(place, part, (head + i) * 4 * ROW)


def weigh(w: Warp, state: State, seen: Register, at: Places, plan: Plan) -> None:
    """Turn scores into weights, one token per lane, and leave them in shared memory; update the statistics."""
    column = at.scores + (at.lane << 2)
    scores = []
    for head in range(plan.group):
        parts = [w.as_float(w.load_shared(column, 1, (4 * head + j) * ROW)[0]) for j in range(4)]
        score = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * plan.scale
        scores.append(w.select(seen, score, w.number(-math.inf)))
    larger = functools.reduce(lambda a, b: a | b, [s > m + _SLACK for s, m in zip(scores, state.m, strict=True)])

    def rescale(carry: list[Register]) -> list[Register]:
        old = State.from_flat(carry, plan)
        m = [w.maximum(a, over_lanes(w, s, at, w.maximum)) for a, s in zip(old.m, scores, strict=True)]
        decay = [w.exp2(a - b) for a, b in zip(old.m, m, strict=True)]
        l = [a * d for a, d in zip(old.l, decay, strict=True)]  # noqa: E741
        factors = [of_columns(w, decay, octet, at, plan) for octet in range(plan.octets)]
        out = [
            [
                [x * f for x, f in zip(part, factor * 2, strict=True)]
                for part, factor in zip(block, factors, strict=True)
            ]
            for block in old.out
        ]
        return State(m, l, out).flat()

    new = State.from_flat(w.branch(w.any(larger), state.flat(), rescale), plan)
    weights = [w.exp2(s - m) for s, m in zip(scores, new.m, strict=True)]
    state.m, state.out = new.m, new.out
    state.l = [a + b for a, b in zip(new.l, weights, strict=True)]
    place = at.weights + (at.lane << 1)
    for head in range(0, plan.group, 2):
        pair = w.pack_pair(weights[head], weights[min(head + 1, plan.group - 1)])
        for i in range(min(2, plan.group - head)):
            w.store_shared_half(place + (head + i) * 2 * TOKENS, pair, i)
    w.sync_warp()


def over_lanes(w: Warp, x: Register, at: Places, combine: Callable[[Register, Register], Register]) -> Register:
    """x of all lanes combined, in all lanes."""
    for distance in (1, 2, 4, 8, 16):
        x = combine(x, w.shuffle(x, at.lane ^ distance))
    return x


def of_columns(w: Warp, heads: list[Register], octet: int, at: Places, plan: Plan) -> list[Register]:
    """What belongs to the heads of a lane's two columns of a product with values, of one number for each head."""

    def by_t(numbers: list[Register]) -> Register:
        picked = numbers[0]
        for i, x in enumerate(numbers[1:], start=1):
            picked = w.select(at.t == i, x, picked)
        return picked

    if plan.parities == 2:
        return [by_t(heads)] * 2
    octet_heads = heads[8 * octet : 8 * octet + 8]
    return [by_t(octet_heads[i::2] or octet_heads) for i in range(2)]


def add_values(w: Warp, state: State, at: Places, plan: Plan) -> None:
    """Add the product of the weights with the tile of values to the sums, and empty the tile, unless it is then filled.

    A product's 16 rows are channels, 8 pairs of them; its inner axis is 16 tokens, its columns heads. A lane reads
    quads of tokens 2 t + i, i = 0 and 1, of pair g, the odd quad first where g is odd, so that the 8 lanes of a phase
    meet all banks. Where there are at most 4 heads, it multiplies them in that order; the columns are then (head,
    parity of the quad), of which a row uses the one of its own parity, and the other is dropped in the end. More heads
    leave no column free: lanes of odd g exchange their two quads first.
    """
    odd = at.g & 1
    quad = (at.t << 1) | odd
    reads = [at.tile + at.g * ROW + ((quad ^ i) << 4) for i in range(2)]
    row, first = ((at.g >> 1), quad) if plan.parities == 2 else (at.g, at.t << 1)
    weights = [
        [
            w.load_shared(at.weights + row * (2 * TOKENS) + ((first ^ i) << 3), 2, 8 * octet * 2 * TOKENS)
            for octet in range(plan.octets)
        ]
        for i in range(2)
    ]
    zeros = [w.integer(0)] * 4
    for block in range(plan.pairs // 8):
        quads = [w.load_shared(read, 4, 8 * block * ROW) for read in reads]
        if not plan.centred:
            for read in reads:
                w.store_shared(read, zeros, 8 * block * ROW)
        if plan.parities == 1:
            quads = [[w.select(odd > 0, b, a) for a, b in zip(*pair, strict=True)] for pair in (quads, quads[::-1])]
        for words, of_quad in zip(quads, weights, strict=True):
            operand = [w.pick_halves(words[n], words[n + 1], half) for n in (0, 2) for half in (0, 1)]
            for octet in range(plan.octets):
                state.out[block][octet] = w.multiply_add(operand, of_quad[octet], state.out[block][octet])


def publish(w: Warp, state: State, at: Places, plan: Plan) -> None:
    """Leave a warp's result in its shared memory: out [G, H] in the tile; m [16] and l [16] in place of the scores."""
    odd = (at.g & 1) > 0
    for octet in range(plan.octets):
        for block in range(plan.pairs // 8):
            part = state.out[block][octet]
            for half in range(2):
                a, b = part[2 * half : 2 * half + 2]
                channel = at.g + (8 * block + half * plan.pairs)
                if plan.parities == 2:
                    w.store_shared(at.tile + (at.t * plan.head_dim + channel) * 4, [w.select(odd, b, a)])
                else:
                    place = at.tile + ((at.t * 2 + 8 * octet) * plan.head_dim + channel) * 4
                    w.store_shared(place, [a])
                    w.store_shared(place, [b], plan.head_dim * 4)
    for head in range(plan.group):
        w.store_shared(at.scores, [state.m[head]], 4 * head)
        w.store_shared(at.scores, [over_lanes(w, state.l[head], at, lambda a, b: a + b)], 4 * (16 + head))


def merge_warps(w: Warp, shared: Register, out: Any, m: Any, l: Any, plan: Plan) -> None:  # noqa: E741
    """Merge what the block's warps have published, and write it to global memory."""
    block, threads, size = w.block(), plan.warps * LANES, plan.group * plan.head_dim
    out, m, l = (w.row(x, block, 4 * n) for x, n in ((out, size), (m, plan.group), (l, plan.group)))  # noqa: E741
    for start in range(0, size, threads):
        element = w.warp() * LANES + w.lane() + start
        there = element < size
        element = w.select(there, element, w.integer(0))
        head = element // plan.head_dim
        sums, statistics = shared + (element << 2), shared + (head << 2)

        def read(address: Register, constant: int, warp: int) -> Register:
            return w.as_float(w.load_shared(address, 1, warp * plan.warp_bytes + constant)[0])

        warps = range(plan.warps)
        largest = [read(statistics, plan.tile_bytes, warp) for warp in warps]
        top = functools.reduce(w.maximum, largest)
        weights = [w.exp2(x - top) for x in largest]
        total, part = w.number(0), w.number(0)
        for warp, weight in enumerate(weights):
            total = total + weight * read(statistics, plan.tile_bytes + 64, warp)
            part = part + weight * read(sums, 0, warp)
        natural = w.select(top > _LOWEST, top * math.log(2), w.number(_LOWEST))
        w.store(out, element << 2, w.as_bits(part), where=there)
        first = w.select(there, element % plan.head_dim, w.integer(1)) == 0
        w.store(m, head << 2, w.as_bits(natural), where=first)
        w.store(l, head << 2, w.as_bits(total), where=first)
