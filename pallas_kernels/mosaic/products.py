"""Queries times keys, softmax, weights times values: what a warp does with a tile, for few and for many query heads.

With one or two query heads per KV head, a lane weighs one token for every head: scores and weights go through shared
memory. With more, or where keys or values are codes, a lane weighs 4 tokens for two heads of each 8: all stays in
registers. docs/kernels.md says what either costs. Lane 4 g + t holds of a product what `Warp.multiply_add` says; g and
t below are these two.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from mustafar_jax.pallas_kernels.mosaic import codes
from mustafar_jax.pallas_kernels.mosaic.mean import read_slow, read_table, read_turned
from mustafar_jax.pallas_kernels.mosaic.plan import ROW, TOKENS, Places, Plan, State
from mustafar_jax.pallas_kernels.mosaic.staged import read_query
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp

LOWEST = float(np.finfo(np.float32).min)
_SLACK = 8.0
"""How far scores, to base 2, may exceed the one that weights are relative to, before all sums are rescaled."""

SeenOf = Callable[[Register], Register]
"""Which tokens, given by their rows, are to be attended."""


class Products(Protocol):
    """Of one warp. Between two of the steps, other lanes' shared memory is to be waited for (`Warp.sync_warp`)."""

    def heads(self) -> list[Register]:
        """The query heads of which this lane holds words, one of each octet; lanes of one t have 8 different ones."""

    def read_query(self) -> list[Register]:
        """The block's queries, as `multiply_keys` wants them: of each of `heads`, of each 8 pairs two words."""

    def multiply_keys(self, query: list[Register], unit: Register) -> list[Register]:
        """Multiply the queries with a unit's tile of keys, and empty it; what `weigh` wants.

        Where keys are centred, the mean's part of the scores, of the turned queries, is where the sums begin.
        """

    def weigh(
        self, state: State, scores: list[Register], unit: Register, seen_of: SeenOf, value_scales: list[Register]
    ) -> list[Register]:
        """Turn a unit's scores into weights, and update the statistics; what `add_values` wants.

        Args:
            state: as it stands before the unit, and after it.
            scores: of `multiply_keys`.
            unit: the unit.
            seen_of: which tokens are seen.
            value_scales: where values are codes, those of a lane's 4 tokens, by which weights are to be multiplied.
        """

    def add_values(self, state: State, weights: list[Register]) -> None:
        """Add weights times the tile of values to the sums, and empty the tile."""

    def mean_sums(self, unit: Register, octet: int = 0) -> list[list[Register]]:
        """The mean's products with an octet's queries, not scaled."""

    def publish(self, state: State) -> None:
        """Leave the result in shared memory: out [G, H] in the tile; m [16] and l [16] in place of the scores."""


def products(w: Warp, at: Places, plan: Plan) -> Products:
    """For a plan's number of query heads."""
    return (ManyHeads if plan.many_heads else FewHeads)(w, at, plan)


class _Common(Products):
    """How queries, the tile and the mean are read, which both share."""

    def __init__(self, w: Warp, at: Places, plan: Plan) -> None:
        self.w, self.at, self.plan = w, at, plan

    def read_query(self) -> list[Register]:
        """Lane (g, t) has numbers t and 4 + t of each 8 pairs."""
        pairs = range(0, self.plan.pairs, 4)
        of_heads = [read_query(self.w, number, pairs, self.at, self.plan) for number in self.heads()]
        return [x for words in of_heads for x in words]

    def mean_sums(self, unit: Register, octet: int = 0) -> list[list[Register]]:
        """The mean's products [2][4]: tokens 0 and 1 of quad g in rows g and g + 8, then 2 and 3.

        Columns are the octet's query heads; those that there are none of repeat others. Of more than 16 fast pairs,
        sums are of two halves, so that a product waits for every other one only.
        """
        w, at, plan = self.w, self.at, self.plan
        number = (at.g + 8 * octet) & (plan.column_heads - 1)
        chains = [[read_slow(w, unit, octet, at, plan) * 2] * 2]
        chains += [[[w.number(0)] * 4] * 2] * (plan.pieces > 4)
        for k in range(plan.pieces // 4):
            query = read_turned(w, number, k, at, plan)
            for i in range(2):
                rows, columns, own = read_table(w, 2 * k + i, at), query[2 * i : 2 * i + 2], i % len(chains)
                chains[own] = [w.multiply_add(a, columns, c) for a, c in zip(rows, chains[own], strict=True)]
        first, *rest = chains
        for other in rest:
            first = [[x + y for x, y in zip(*parts, strict=True)] for parts in zip(first, other, strict=True)]
        return first

    def read_values(self, block: int) -> list[list[Register]]:
        """Quads 2 t and 2 t + 1 of pair g, the odd one first where g is odd, so that a phase meets all banks."""
        w, at = self.w, self.at
        quad = (at.t << 1) | (at.g & 1)
        reads = [at.tile + at.g * ROW + ((quad ^ i) << 4) for i in range(2)]
        quads = [w.load_shared(read, 4, 8 * block * ROW) for read in reads]
        for read in reads:
            w.store_shared(read, [w.integer(0)] * 4, 8 * block * ROW)
        return quads

    def channels(self, words: list[Register]) -> list[Register]:
        """Four tokens of a pair as a product's operand, whose rows are channels: low ones, then high ones."""
        return [self.w.pick_halves(words[n], words[n + 1], half) for n in (0, 2) for half in (0, 1)]

    def over_lanes(
        self, x: Register, distances: tuple[int, ...], combine: Callable[[Register, Register], Register]
    ) -> Register:
        """x of the lanes that differ in these bits combined, in all of them."""
        for distance in distances:
            x = combine(x, self.w.shuffle(x, self.at.lane ^ distance))
        return x


class FewHeads(_Common):
    """One or two query heads; the product with keys has tokens as rows.

    Its inner axis is 8 pairs of channels, its columns (class j, head) = 2 j + head for 4 classes and 2 heads. A lane
    reads quad (g + 2 t) % 8 of pair t, so that the 8 lanes of a phase meet all banks. A row thus mixes the quads of 4
    classes of pairs; the queries are zero but for one class in each column, which keeps them apart.
    """

    def heads(self) -> list[Register]:
        """Head g % 2 where column g is of class t, else one that there is not: its words are zero."""
        return [(((self.at.t + 4 - (self.at.g >> 1)) & 3) << 1) + (self.at.g & 1)]

    def multiply_keys(self, query: list[Register], unit: Register) -> list[Register]:
        """Leaves parts of scores in shared memory: of (head, class t) for quad n in word 4 n of scores[head][t]."""
        w, at, plan = self.w, self.at, self.plan
        sums = self._mean_scores(unit) if plan.centred else [[w.number(0)] * 4] * 2
        for step in range(plan.pairs // 8):
            columns = query[2 * step : 2 * step + 2]
            sums = [w.multiply_add(a, columns, c) for a, c in zip(self._read_rows(step), sums, strict=True)]
        place = at.scores + at.t * ROW + (((at.g + at.t * 2) & 7) << 4) + ((at.t & 1) << 3)
        for half, x in enumerate(sums):
            for head in range(plan.group):
                w.store_shared(place ^ (8 * half), [x[head], x[head + 2]], head * 4 * ROW)
        return []

    def _read_rows(self, step: int) -> list[list[Register]]:
        """Two tokens of quad (g + 2 t) % 8 of pairs t and 4 + t of 8, then the other two, as rows; they are emptied.

        Tokens 0 and 1 come first where t is even, 2 and 3 where it is odd, so that half a warp meets all banks. Read 8
        bytes at a time, words stand in the order of a product's operand and need not be moved.
        """
        w, at = self.w, self.at
        quad = at.tile + at.t * ROW + (((at.g + at.t * 2) & 7) << 4)
        first = quad + ((at.t & 1) << 3)
        starts = [8 * step * ROW, (8 * step + 4) * ROW]
        rows = [[x for start in starts for x in w.load_shared(read, 2, start)] for read in (first, first ^ 8)]
        for start in starts:
            w.store_shared(quad, [w.integer(0)] * 4, start)
        return rows

    def _mean_scores(self, unit: Register) -> list[list[Register]]:
        """The mean's part of scores [2][4]: class 0 has quad g in row g, as the mean's product, in columns 0 and 1."""
        w, at = self.w, self.at
        return [[w.select(at.t == 0, x, w.number(0)) for x in part] for part in self.mean_sums(unit)]

    def weigh(
        self, state: State, scores: list[Register], unit: Register, seen_of: SeenOf, value_scales: list[Register]
    ) -> list[Register]:
        """A token per lane, whose parts of scores are in shared memory; leaves the weights there."""
        w, at, plan = self.w, self.at, self.plan
        seen, column = seen_of(unit * TOKENS + at.token), at.scores + (at.lane << 2)
        scores = []
        for head in range(plan.group):
            parts = [w.as_float(w.load_shared(column, 1, (4 * head + j) * ROW)[0]) for j in range(4)]
            score = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * plan.scale
            scores.append(w.select(seen, score, w.number(-math.inf)))
        larger = functools.reduce(lambda a, b: a | b, [s > m + _SLACK for s, m in zip(scores, state.m, strict=True)])

        def rescale(carry: list[Register]) -> list[Register]:
            old = State.from_flat(carry, plan)
            largest = [self.over_lanes(s, (1, 2, 4, 8, 16), w.maximum) for s in scores]
            m = [w.maximum(a, b) for a, b in zip(old.m, largest, strict=True)]
            decay = [w.exp2(a - b) for a, b in zip(old.m, m, strict=True)]
            return old.rescaled(m, decay, [[self._of_column(decay)] * 4]).flat()

        new = State.from_flat(w.branch(w.any(larger), state.flat(), rescale), plan)
        weights = [w.exp2(s - m) for s, m in zip(scores, new.m, strict=True)]
        state.m, state.out = new.m, new.out
        state.l = [a + b for a, b in zip(new.l, weights, strict=True)]
        place, pair = at.weights + (at.lane << 1), w.pack_pair(weights[0], weights[-1])
        for head in range(plan.group):
            w.store_shared_half(place + head * 2 * TOKENS, pair, head)
        w.sync_warp()
        return []

    def _of_column(self, heads: list[Register]) -> Register:
        """What belongs to the head of a lane's columns of a product with values, of one number for each head."""
        picked = heads[0]
        for i, x in enumerate(heads[1:], start=1):
            picked = self.w.select(self.at.t == i, x, picked)
        return picked

    def add_values(self, state: State, weights: list[Register]) -> None:
        """A product's 16 rows are channels, 8 pairs of them; its inner axis is 16 tokens.

        Its columns are (head, parity of the quad), of which a row uses the one of its own parity, since lanes of odd g
        read the odd quad first; the other one is dropped in the end.
        """
        w, at, plan = self.w, self.at, self.plan
        row = at.weights + (at.g >> 1) * (2 * TOKENS)
        first = (at.t << 1) | (at.g & 1)
        of_quads = [w.load_shared(row + ((first ^ i) << 3), 2) for i in range(2)]
        for block in range(plan.pairs // 8):
            for words, of_quad in zip(self.read_values(block), of_quads, strict=True):
                state.out[block][0] = w.multiply_add(self.channels(words), of_quad, state.out[block][0])

    def publish(self, state: State) -> None:
        """Each lane's row has one column of its own parity."""
        w, at, plan = self.w, self.at, self.plan
        odd = (at.g & 1) > 0
        for block, [part] in enumerate(state.out):
            for half in range(2):
                channel = at.g + (8 * block + half * plan.pairs)
                x = w.select(odd, part[2 * half + 1], part[2 * half])
                w.store_shared(at.tile + (at.t * plan.head_dim + channel) * 4, [x])
        for head in range(plan.group):
            w.store_shared(at.scores, [state.m[head]], 4 * head)
            total = self.over_lanes(state.l[head], (1, 2, 4, 8, 16), lambda a, b: a + b)
            w.store_shared(at.scores, [total], 4 * (16 + head))


class ManyHeads(_Common):
    """3 to 16 query heads, 8 at a time: an octet. They are columns of both products.

    The inner axis of the product with keys is 8 pairs of channels. A lane reads quad g of pair t if t < 2, else quad g
    ^ 4, half of it at a time, so that half a warp meets all banks. A row thus mixes the quads of 2 classes of pairs;
    the queries are zero but for one class, and lanes then hand the other one's part on. A lane has 4 tokens for heads 2
    t and 2 t + 1; only their weights, 16 bits each, change lanes once more.
    """

    def heads(self) -> list[Register]:
        """Head g of each octet."""
        return [self.at.g + 8 * octet for octet in range(self.plan.octets)]

    def multiply_keys(self, query: list[Register], unit: Register) -> list[Register]:
        """Scores [octets][4 tokens of quad g][heads 2 t and 2 t + 1]; where keys are codes, products alone."""
        w, at, plan = self.w, self.at, self.plan
        coded = plan.key.bits > 0
        size, first_class, zero = len(query) // plan.octets, at.t < 2, w.integer(0)
        sums = [self._first_sums(unit, octet) for octet in range(plan.octets)]
        for step in range(plan.pairs // 8):
            rows = self._read_rows(step)
            for octet, of_classes in enumerate(sums):
                words = query[octet * size + 2 * step :][:2]
                first = [w.select(first_class, x, zero) for x in words]
                second = [w.select(first_class, zero, x) for x in words]
                for i, columns in enumerate((first, second)):
                    of_classes[i] = [
                        w.multiply_add(a, columns, c, float16=coded) for a, c in zip(rows, of_classes[i], strict=True)
                    ]
        w.sync_warp()
        clear_tile(w, at, plan)
        products = [x for of_classes in sums for x in self._hand_on(of_classes)]
        return products if coded else [x * plan.scale for x in products]

    def _first_sums(self, unit: Register, octet: int) -> list[list[list[Register]]]:
        """Where the sums [2 classes][2][4] of an octet begin: class 0 has quad g in row g, as the mean's product."""
        zeros = [[self.w.number(0)] * 4] * 2
        return [self.mean_sums(unit, octet) if self.plan.centred and not self.plan.key.bits else zeros, zeros]

    def _read_rows(self, step: int) -> list[list[Register]]:
        """Tokens 0 and 1 of a quad of pairs t and 4 + t of 8, then 2 and 3, as rows.

        Lanes of odd t read tokens 2 and 3 first, since those of even t meet the banks of 0 and 1.
        """
        w, at = self.w, self.at
        first = at.tile + at.t * ROW + ((at.g ^ ((at.t >> 1) << 2)) << 4) + ((at.t & 1) << 3)
        odd = (at.t & 1) > 0
        rows: list[list[Register]] = [[], []]
        for start in (8 * step * ROW, (8 * step + 4) * ROW):
            a, b = (w.load_shared(read, 2, start) for read in (first, first ^ 8))
            for half, (x, y) in enumerate(((b, a), (a, b))):
                rows[half] += [w.select(odd, *both) for both in zip(x, y, strict=True)]
        return rows

    def _hand_on(self, of_classes: list[list[list[Register]]]) -> list[Register]:
        """Both classes' parts added up: class 1 has quad g ^ 4 in row g."""
        ours, others = ([x for part in parts for x in part] for parts in of_classes)
        return [a + self.w.shuffle(b, self.at.lane ^ 16) for a, b in zip(ours, others, strict=True)]

    def weigh(
        self, state: State, scores: list[Register], unit: Register, seen_of: SeenOf, value_scales: list[Register]
    ) -> list[Register]:
        """Weights [octets][4] of head g, a word for each token of a quad: of quad 2 t, then of 2 t + 1."""
        w, at, plan = self.w, self.at, self.plan
        seen, count = seen_of(unit * TOKENS + at.token), len(scores)

        def hide(numbers: list[Register]) -> list[Register]:
            seen = [seen_of(unit * TOKENS + at.g + 8 * i) for i in range(4)]
            scores = [w.select(seen[i // 2 % 4], x, w.number(-math.inf)) for i, x in enumerate(numbers[:count])]
            return scores + [w.select(there, x, w.number(0)) for there, x in zip(seen, numbers[count:], strict=False)]

        numbers = w.branch(w.any(w.select(seen, w.integer(0), w.integer(1)) > 0), [*scores, *value_scales], hide)
        scores, value_scales = numbers[:count], numbers[count:]
        of_heads = [scores[8 * octet + i : 8 * octet + 8 : 2] for octet in range(plan.octets) for i in range(2)]
        largest = [functools.reduce(w.maximum, x) for x in codes.raised(w, of_heads, value_scales)]
        larger = functools.reduce(lambda a, b: a | b, [s > m + _SLACK for s, m in zip(largest, state.m, strict=True)])

        def rescale(carry: list[Register]) -> list[Register]:
            old = State.from_flat(carry, plan)
            m = [w.maximum(a, self._over_quads(s, w.maximum)) for a, s in zip(old.m, largest, strict=True)]
            decay = [w.exp2(a - b) for a, b in zip(old.m, m, strict=True)]
            # a lane's columns of a product with values are of the same two heads
            return old.rescaled(m, decay, [decay[i : i + 2] * 2 for i in range(0, len(decay), 2)]).flat()

        new = State.from_flat(w.branch(w.any(larger), state.flat(), rescale), plan)
        weights = [[w.exp2(s - m) for s in x] for x, m in zip(of_heads, new.m, strict=True)]
        state.m, state.out = new.m, new.out
        state.l = [functools.reduce(lambda a, b: a + b, x, total) for x, total in zip(weights, new.l, strict=True)]
        words = []
        for i in range(0, len(weights), 2):
            pairs = zip(*weights[i : i + 2], strict=True)
            scales = value_scales
            words += codes.scaled(w, pairs, scales, plan) if scales else [w.pack_pair(*x) for x in pairs]
        return [w.transpose(x) for x in words]

    def _over_quads(self, x: Register, combine: Callable[[Register, Register], Register]) -> Register:
        """What lanes of one t have, combined."""
        return self.over_lanes(x, (4, 8, 16), combine)

    def add_values(self, state: State, weights: list[Register]) -> None:
        """A product's 16 rows are channels, 8 pairs of them; its inner axis is 16 tokens, its columns heads.

        Neighbours along the inner axis are a token of quad 2 t and the same one of 2 t + 1: words are picked from a
        read of either, in one order or the other, so lanes of odd g need not exchange their quads first.
        """
        w, plan = self.w, self.plan
        odd = (self.at.g & 1) > 0
        orders = [w.select(odd, w.integer(a), w.integer(b)) for a, b in ((0x1054, 0x5410), (0x3276, 0x7632))]
        for block in range(plan.pairs // 8):
            of_tokens = zip(*self.read_values(block), strict=True)
            words = [w.pick_bytes(a, b, order) for a, b in of_tokens for order in orders]
            for i in range(2):
                operand = words[4 * i :][:4]
                for octet in range(plan.octets):
                    columns = weights[4 * octet + 2 * i :][:2]
                    state.out[block][octet] = w.multiply_add(operand, columns, state.out[block][octet])

    def publish(self, state: State) -> None:
        """Each lane has two heads of its channels."""
        w, at, plan = self.w, self.at, self.plan
        coded = plan.value.is_direct
        out = codes.without_middle(w, state.out, plan) if coded else state.out
        of_block, of_half = (16, 8) if coded else (8, plan.pairs)
        for octet in range(plan.octets):
            for block in range(plan.tiles):
                part = out[block][octet]
                for half in range(2):
                    channel = at.g + (of_block * block + of_half * half)
                    place = at.tile + ((at.t * 2 + 8 * octet) * plan.head_dim + channel) * 4
                    for i in range(2):
                        w.store_shared(place, [part[2 * half + i]], i * plan.head_dim * 4)
            m, l = (x[2 * octet : 2 * octet + 2] for x in (state.m, state.l))  # noqa: E741
            for i, x in enumerate((m, [self._over_quads(total, lambda a, b: a + b) for total in l])):
                w.store_shared(at.scores + (at.t << 3), x, 4 * (16 * i + 8 * octet))


def clear_tile(w: Warp, at: Places, plan: Plan) -> None:
    """Fill the tile with zeros."""
    zeros = [w.integer(0)] * 4
    for start in range(0, plan.tile_bytes, 16 * LANES):
        w.store_shared(at.tile + (at.lane << 4), zeros, start)
    w.sync_warp()
