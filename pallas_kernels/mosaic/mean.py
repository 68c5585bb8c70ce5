"""The mean key's part of scores, where packed keys are distances from it.

A key is what is packed and the mean m, rotated to its position s + j, s that of its unit's first token. The mean's part
of a score is q . R_(s+j) m. Its slow pairs of channels are rotated to the middle of a unit (`operands.Mean`): they add
one number for each query head and unit. A block computes these before its first unit, 16 units in a product. The fast
pairs' part is (R_-s q) . R_j m: a product of queries, which a warp turns back for each unit, with a table of R_j m,
which serves all units of a block.

The table and the turned queries are operands of products, in the order in which lanes 4 g + t read them: 16 bytes
each, one lane's beside the next's. Queries are turned a piece at a time: piece 4 k + t is the pairs 16 k + 4 i + t, i =
0 to 3, which these lanes multiply in two steps of a product.
"""

import functools
from typing import Any

import numpy as np

from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.mosaic.plan import TOKENS, Places, Plan
from mustafar_jax.pallas_kernels.mosaic.staged import read_mean, read_query
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp

_QUADS = TOKENS // 4
_BLOCK = 16 * LANES
"""Bytes of what a warp reads of the table at once: two tokens of each quad, 8 pairs."""

Piece = list[list[Register]]
"""Float32 [2][4]: the low and the high channels of 4 pairs, or the cosines and sines of their turns."""


def turns(mean: Mean, plan: Plan) -> np.ndarray:
    """Cosines and sines of fast pairs' turns: back from each unit; to its first 8 tokens; by 8.

    Float32 [units + 9, 2, fast pairs], pairs in the order of pieces. They are constants, as `middles` are, and the same
    for every layer of a model, whose compiler keeps one.
    """
    starts = mean.offset + mean.dealt.row(np.arange(plan.units) * TOKENS)
    positions = np.concatenate([-starts, np.arange(_QUADS), [_QUADS]]).astype(np.float32)
    pairs = np.arange(plan.fast_pairs).reshape(-1, 4, 4).swapaxes(1, 2).reshape(-1)
    return _cos_and_sin(positions[:, None] * mean.inv_freq[pairs][None], axis=1)


def middles(mean: Mean, plan: Plan) -> np.ndarray:
    """Turns of slow pairs to the middle of each unit: float32 [units, steps, 4 lanes t, pairs t and 4 + t of 8, 2].

    The last axis is cosine and sine; there are rows for all units of the last block's products.
    """
    units = (plan.splits - 1) * plan.units_per_split + plan.slow_rows
    positions = (mean.offset + mean.dealt.row(np.arange(units) * TOKENS) + TOKENS // 2).astype(np.float32)
    pairs = plan.fast_pairs + np.arange(plan.slow_pairs).reshape(-1, 2, 4).swapaxes(1, 2)
    return _cos_and_sin(positions[:, None, None, None] * mean.inv_freq[pairs][None], axis=-1)


def _cos_and_sin(angle: np.ndarray, axis: int) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=axis).astype(np.float32)


class MeanKey:
    """The mean key of a block's KV head, for one of its warps."""

    def __init__(self, w: Warp, refs: list[Any], at: Places, plan: Plan) -> None:
        self.w, self.at, self.plan = w, at, plan
        self.turns, *self.middles = refs

    def share(self, end: Register) -> None:
        """Leave the table, the queries and the slow pairs' scores of units before `end` in the block's memory."""
        w, steps = self.w, self.plan.pieces // 4
        w.branch(w.warp() < steps, [], self._store_table)
        for k in range(steps):
            w.branch(w.warp() == k, [], functools.partial(self._store_queries, k))
        if self.middles:
            self._store_slow(end)

    def _store_slow(self, end: Register) -> None:
        """Scores of slow pairs, each warp of 16 units at a time: rows of a product, whose columns are queries."""
        w, at, plan = self.w, self.at, self.plan
        slow = range(plan.fast_pairs, plan.pairs, 4)
        pairs = read_mean(w, at.t << 2, slow, at, plan)
        columns = [read_query(w, at.g + 8 * octet, slow, at, plan) for octet in range(plan.octets)]
        units = w.select(at.first_unit < end, end - at.first_unit, w.integer(0))

        def store(tile: Register, carry: list[Register]) -> list[Register]:
            for octet, of_heads in enumerate(self._slow_sums(self._load_middles(tile), pairs, columns)):
                for i, unit in enumerate(_units_of(tile, at)):
                    place = at.slow + unit * plan.slow_stride + (at.t << 3)
                    w.store_shared(place, of_heads[2 * i : 2 * i + 2], 32 * octet)
            return carry

        w.loop(w.warp(), (units + 15) >> 4, plan.warps, [], store)

    def _load_middles(self, tile: Register) -> list[Register]:
        """Turns of slow pairs to the middles of 16 units, of g and g + 8: [steps][2][4]."""
        w, at, plan = self.w, self.at, self.plan
        starts = [(at.first_unit + unit) * (plan.slow_pairs * 8) + (at.t << 4) for unit in _units_of(tile, at)]
        turns: list[Register] = []
        for step in range(plan.slow_pairs // 8):
            for start in starts:
                turns += map(w.as_float, w.load(self.middles[0], start, 4, 64 * step))
        return turns

    def _slow_sums(
        self, middles: list[Register], pairs: list[list[Register]], columns: list[list[Register]]
    ) -> list[list[Register]]:
        """Products [octets][4] of the mean's pairs p + t, rotated by `_load_middles`' turns, with the queries."""
        w, plan = self.w, self.plan
        sums = [[w.number(0)] * 4] * plan.octets
        for step in range(plan.slow_pairs // 8):
            turns = [middles[8 * step : 8 * step + 4], middles[8 * step + 4 : 8 * step + 8]]
            operand = []
            for pair, (low, high) in enumerate(pairs[2 * step : 2 * step + 2]):
                for cos, sin in (turn[2 * pair : 2 * pair + 2] for turn in turns):
                    x, y = rotate(w, [[low], [high]], [[cos], [sin]])
                    operand.append(w.pack_pair(*x, *y))
            for octet, words in enumerate(columns):
                sums[octet] = w.multiply_add(operand, words[2 * step : 2 * step + 2], sums[octet])
        return sums

    def _store_table(self, carry: list[Register]) -> list[Register]:
        """Warp k has pairs 16 k to 16 k + 15: lane 4 g + t has piece 4 k + t for quad g."""
        w, at, plan = self.w, self.at, self.plan
        piece = (w.warp() << 2) + at.t
        to_first = self._load_turn(at.g + plan.units, piece)
        by_eight = self._load_turn(w.integer(plan.units + _QUADS), piece)
        pairs = read_mean(w, (w.warp() << 6) + (at.t << 2), range(0, 16, 4), at, plan)
        tokens = [rotate(w, [list(half) for half in zip(*pairs, strict=True)], to_first)]
        for _ in range(3):
            tokens.append(rotate(w, tokens[-1], by_eight))
        words = [[w.pack_pair(low[i], high[i]) for low, high in tokens] for i in range(4)]
        place = at.table + w.warp() * (4 * _BLOCK) + (at.lane << 4)
        for block in range(4):
            first, token = block // 2 * 2, block % 2 * 2
            a, b = (of_pair[token : token + 2] for of_pair in words[first : first + 2])
            w.store_shared(place, [*a, *b], block * _BLOCK)
        return carry

    def _store_queries(self, k: int, carry: list[Register]) -> list[Register]:
        """Pieces 4 k to 4 k + 3 of all queries, lane 4 g + t piece 4 k + t of queries g."""
        w, at, plan = self.w, self.at, self.plan
        for octet in range(plan.octets):
            number = at.g + 8 * octet
            words = read_query(w, number, range(16 * k, 16 * k + 16, 4), at, plan)
            place = at.queries + ((number * plan.pieces + 4 * k + at.t) << 4)
            for half, x in enumerate(zip(*map(w.unpack_pair, words), strict=True)):
                w.store_shared(place, x, half * plan.queries_bytes // 2)
        return carry

    def load_turn(self, unit: Register) -> Piece:
        """Begin to load the turn back from a unit, of the piece that this lane turns."""
        return self._load_turn(unit, self.at.lane & (self.plan.pieces - 1))

    def _load_turn(self, row: Register, piece: Register) -> Piece:
        w, size = self.w, self.plan.fast_pairs * 4
        offset = row * (2 * size) + (piece << 4)
        return [[w.as_float(x) for x in w.load(self.turns, offset, 4, half * size)] for half in range(2)]

    def turn_queries(self, turn: Piece) -> None:
        """Turn all queries back, this lane a piece of some; they are then read by `read_turned`."""
        w, at, plan = self.w, self.at, self.plan
        piece = at.lane << 4
        for first in range(0, plan.turned_heads, LANES // plan.pieces):
            starts = [first * plan.pieces * 16 + half * plan.queries_bytes // 2 for half in range(2)]
            query = [[w.as_float(x) for x in w.load_shared(at.queries + piece, 4, start)] for start in starts]
            words = [w.pack_pair(*pair) for pair in zip(*rotate(w, query, turn), strict=True)]
            place = at.turned + piece + at.lane // plan.pieces * (plan.turned_stride - plan.fast_pairs * 4)
            w.store_shared(place, words, first * plan.turned_stride)


def _units_of(tile: Register, at: Places) -> list[Register]:
    """Units of a block that are a lane's rows in a product of 16."""
    return [(tile << 4) + at.g + 8 * i for i in range(2)]


def rotate(w: Warp, channels: Piece, turn: Piece) -> Piece:
    """Pairs of channels turned by angles, given as cosines and sines."""

    def one(x: Register, y: Register, c: Register, s: Register) -> tuple[Register, Register]:
        return w.fused(y, s * -1.0, x * c), w.fused(x, s, y * c)

    low, high = zip(*(one(*of_pair) for of_pair in zip(*channels, *turn, strict=True)), strict=True)
    return [list(low), list(high)]


def read_turned(w: Warp, number: Register, k: int, at: Places, plan: Plan) -> list[Register]:
    """Piece 4 k + t of a turned query: columns of two products."""
    return w.load_shared(at.turned + number * plan.turned_stride + (at.t << 4), 4, 64 * k)


def read_slow(w: Warp, unit: Register, octet: int, at: Places, plan: Plan) -> list[Register]:
    """The slow pairs' part of the scores of heads 2 t and 2 t + 1 of an octet, the same for all tokens of a unit."""
    if not plan.slow_pairs:
        return [w.number(0)] * 2
    place = at.slow + (unit - at.first_unit) * plan.slow_stride + (at.t << 3)
    return [w.as_float(x) for x in w.load_shared(place, 2, 32 * octet)]


def read_table(w: Warp, step: int, at: Places) -> list[list[Register]]:
    """Pairs t and 4 + t of 8 for quad g: its tokens 0 and 1, then 2 and 3, as rows of a product."""
    return [w.load_shared(at.table + (at.lane << 4), 4, (2 * step + half) * _BLOCK) for half in range(2)]
