"""The mean key's part of scores, where packed keys are distances from it.

A key is what is packed and the mean m, rotated to its position s + j, s that of its unit's first token. The mean's part
of a score is q . R_(s+j) m = (R_-s q) . R_j m: a product of queries, which a warp turns back for each unit, with a
table of R_j m, which serves all units of a block.

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
    """Cosines and sines of turns, float32 [units + 9, 2, pairs]: back from each unit; to its first 8 tokens; by 8.

    Pairs stand in the order of pieces. The turns are the same for every layer of a model, whose compiler keeps one.
    """
    starts = mean.offset + np.arange(plan.units) * TOKENS
    positions = np.concatenate([-starts, np.arange(_QUADS), [_QUADS]]).astype(np.float32)
    pairs = np.arange(plan.pairs).reshape(-1, 4, 4).swapaxes(1, 2).reshape(-1)
    angle = jnp.asarray(positions)[:, None] * mean.inv_freq[pairs][None]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


class MeanKey:
    """The mean key of a block's KV head, for one of its warps."""

    def __init__(self, w: Warp, key: Any, turns: Any, at: Places, plan: Plan) -> None:
        self.w, self.key, self.turns, self.at, self.plan = w, key, turns, at, plan

    def share(self, head: Register, query: list[Register], numbers: list[Register]) -> None:
        """Leave the table and the queries in the block's memory, 16 pairs of channels each warp.

        Args:
            head: the KV head.
            query: a lane's words of queries, as `Products.load_query` gives them.
            numbers: which queries these are.
        """
        w, pieces = self.w, self.plan.pieces
        w.branch(w.warp() < pieces // 4, [], lambda _: self._store_table(head))
        for k in range(pieces // 4):
            words = [x for i in range(len(numbers)) for x in query[i * pieces + 4 * k :][:4]]
            w.branch(w.warp() == k, words, lambda words: self._store_queries(words, numbers))
        w.sync_block()

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
        w, size = self.w, self.plan.pairs * 4
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
            place = at.turned + piece + at.lane // plan.pieces * (plan.turned_stride - plan.pairs * 4)
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


def read_table(w: Warp, step: int, at: Places) -> list[list[Register]]:
    """Pairs t and 4 + t of 8 for quad g: its tokens 0 and 1, then 2 and 3, as rows of a product."""
    return [w.load_shared(at.table + (at.lane << 4), 4, (2 * step + half) * _BLOCK) for half in range(2)]
