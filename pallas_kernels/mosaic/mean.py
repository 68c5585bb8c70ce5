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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.mosaic.plan import TOKENS, Places, Plan
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp

_QUADS = TOKENS // 4
_BLOCK = 16 * LANES
"""Bytes of what a warp reads of the table at once: two tokens of each quad, 8 pairs."""

Piece = list[list[Register]]
"""Float32 [2][4]: the low and the high channels of 4 pairs, or the cosines and sines of their turns."""


def turns(mean: Mean, plan: Plan) -> jax.Array:
    """Cosines and sines of fast pairs' turns: back from each unit; to its first 8 tokens; by 8.

    Float32 [units + 9, 2, fast pairs], pairs in the order of pieces. The turns are the same for every layer of a model,
    whose compiler keeps one; `middles` too.
    """
    starts = mean.offset + np.arange(plan.units) * TOKENS
    positions = np.concatenate([-starts, np.arange(_QUADS), [_QUADS]]).astype(np.float32)
    pairs = np.arange(plan.fast_pairs).reshape(-1, 4, 4).swapaxes(1, 2).reshape(-1)
    angle = jnp.asarray(positions)[:, None] * mean.inv_freq[pairs][None]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


def middles(mean: Mean, plan: Plan) -> jax.Array:
    """Turns of slow pairs to the middle of each unit: float32 [units, steps, 4 lanes t, pairs t and 4 + t of 8, 2].

    The last axis is cosine and sine; there are rows for all units of the last block's products.
    """
    units = (plan.splits - 1) * plan.units_per_split + plan.slow_rows
    positions = (mean.offset + np.arange(units) * TOKENS + TOKENS // 2).astype(np.float32)
    pairs = plan.fast_pairs + np.arange(plan.slow_pairs).reshape(-1, 2, 4).swapaxes(1, 2)
    angle = jnp.asarray(positions)[:, None, None, None] * mean.inv_freq[pairs][None]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class MeanKey:
    """The mean key of a block's KV head, for one of its warps."""

    def __init__(self, w: Warp, refs: list[Any], at: Places, plan: Plan) -> None:
        self.w, self.at, self.plan = w, at, plan
        self.key, self.turns, *self.middles = refs

    def share(
        self,
        head: Register,
        query: list[Register],
        numbers: list[Register],
        columns: list[Register],
        end: Register,
    ) -> None:
        """Leave the table, the queries and the slow pairs' scores in the block's memory.

        Args:
            head: the KV head.
            query: a lane's words of queries, as `Products.load_query` gives them.
            numbers: which queries these are.
            columns: the same of the queries g of each octet.
            end: the block's units end before this one.
        """
        w, pieces, size = self.w, self.plan.pieces, self.plan.pairs // 4
        w.branch(w.warp() < pieces // 4, [], lambda _: self._store_table(head))
        for k in range(pieces // 4):
            words = [x for i in range(len(numbers)) for x in query[i * size + 4 * k :][:4]]
            w.branch(w.warp() == k, words, lambda words: self._store_queries(words, numbers))
        if self.middles:
            self._store_slow(head, columns, end)
        w.sync_block()

    def _store_slow(self, head: Register, columns: list[Register], end: Register) -> None:
        """Scores of slow pairs, each warp of 16 units at a time: rows of a product, whose columns are queries."""
        w, at, plan = self.w, self.at, self.plan
        row = w.row(self.key, head, plan.head_dim * 4)
        firsts = range(plan.fast_pairs, plan.pairs, 4)
        pairs = [[w.as_float(w.load(row, at.t << 2, 1, 4 * (p + h))[0]) for h in (0, plan.pairs)] for p in firsts]

        def store(tile: Register, _: list[Register]) -> list[Register]:
            rows = [(tile << 4) + at.g + 8 * i for i in range(2)]
            sums = self._slow_sums(rows, pairs, columns)
            for octet, of_heads in enumerate(sums):
                for i, unit in enumerate(rows):
                    place = at.slow + unit * plan.slow_stride + (at.t << 3)
                    w.store_shared(place, of_heads[2 * i : 2 * i + 2], 32 * octet)
            return []

        units = w.select(at.first_unit < end, end - at.first_unit, w.integer(0))
        w.loop(w.warp(), (units + 15) >> 4, plan.warps, [], store)

    def _slow_sums(
        self, rows: list[Register], pairs: list[list[Register]], columns: list[Register]
    ) -> list[list[Register]]:
        """Products [octets][4] of the mean's pairs p + t, rotated to units g and g + 8 of some, with the queries."""
        w, at, plan = self.w, self.at, self.plan
        sums = [[w.number(0)] * 4] * plan.octets
        starts = [(at.first_unit + unit) * (plan.slow_pairs * 8) + (at.t << 4) for unit in rows]
        for step in range(plan.slow_pairs // 8):
            turns = [[w.as_float(x) for x in w.load(self.middles[0], start, 4, 64 * step)] for start in starts]
            operand = []
            for i, (low, high) in enumerate(pairs[2 * step : 2 * step + 2]):
                for cos, sin in (turn[2 * i : 2 * i + 2] for turn in turns):
                    x, y = rotate(w, [[low], [high]], [[cos], [sin]])
                    operand.append(w.pack_pair(*x, *y))
            for octet in range(plan.octets):
                words = columns[octet * (plan.pairs // 4) + plan.fast_pairs // 4 + 2 * step :][:2]
                sums[octet] = w.multiply_add(operand, words, sums[octet])
        return sums

    def _store_table(self, head: Register) -> list[Register]:
        """Warp k has pairs 16 k to 16 k + 15: lane 4 g + t has piece 4 k + t for quad g."""
        w, at, plan = self.w, self.at, self.plan
        piece = (w.warp() << 2) + at.t
        to_first = self._load_turn(at.g + plan.units, piece)
        by_eight = self._load_turn(w.integer(plan.units + _QUADS), piece)
        row, first = w.row(self.key, head, plan.head_dim * 4), (w.warp() << 6) + (at.t << 2)
        halves = [[w.load(row, first, 1, 16 * i + 4 * half)[0] for i in range(4)] for half in (0, plan.pairs)]
        tokens = [rotate(w, [[w.as_float(x) for x in half] for half in halves], to_first)]
        for _ in range(3):
            tokens.append(rotate(w, tokens[-1], by_eight))
        words = [[w.pack_pair(low[i], high[i]) for low, high in tokens] for i in range(4)]
        place = at.table + w.warp() * (4 * _BLOCK) + (at.lane << 4)
        for block in range(4):
            pair, token = block // 2 * 2, block % 2 * 2
            a, b = (of_pair[token : token + 2] for of_pair in words[pair : pair + 2])
            w.store_shared(place, [*a, *b], block * _BLOCK)
        return []

    def _store_queries(self, words: list[Register], numbers: list[Register]) -> list[Register]:
        """Warp k has pieces 4 k to 4 k + 3 of all queries, lane 4 g + t words of piece 4 k + t."""
        w, at, plan = self.w, self.at, self.plan
        for i, number in enumerate(numbers):
            channels = zip(*(w.unpack_pair(x) for x in words[4 * i : 4 * i + 4]), strict=True)
            place = at.queries + ((number * plan.pieces + (w.warp() << 2) + at.t) << 4)
            for half, x in enumerate(channels):
                w.store_shared(place, x, half * plan.queries_bytes // 2)
        return words

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
