"""What all warps of a block read of its KV head before their first unit: the queries, and the mean key.

They come through shared memory: each thread loads 16 bytes, so that the block waits for global memory once.
"""

from typing import Any

from mustafar_jax.pallas_kernels.mosaic.plan import Places, Plan
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp

_PIECE = 16
"""Bytes that a thread loads at a time."""


class Staged:
    """Queries and mean key of a block's KV head, which are on their way from the beginning."""

    def __init__(self, w: Warp, query: Any, mean: Any | None, head: Register, at: Places, plan: Plan) -> None:
        self.w, self.at, self.plan = w, at, plan
        thread = w.warp() * LANES + w.lane()
        self.queries = self._load(
            w.row(query, head, plan.group * plan.head_dim * 2), thread, plan.group * plan.head_dim * 2
        )
        last = w.integer(plan.warps * LANES - 1) - thread  # other warps than the queries'
        size = plan.head_dim * 4
        self.mean = [] if mean is None else self._load(w.row(mean, head, size), last, size)

    def _load(self, row: Any, thread: Register, size: int) -> list[tuple[Register, Register, list[Register]]]:
        """Begin to load a thread's pieces of so many bytes: where each begins, whether it is there, its words."""
        w, pieces = self.w, []
        for start in range(0, size, self.plan.warps * LANES * _PIECE):
            offset = thread * _PIECE + start
            there = offset < size
            pieces.append((offset, there, w.load(row, offset, 4, where=there, early=True)))
        return pieces

    def share(self) -> None:
        """Leave both in shared memory, for all warps."""
        w, at, plan = self.w, self.at, self.plan
        row = plan.head_dim * 2
        for offset, there, words in self.queries:
            place = at.staged_queries + offset // row * plan.query_stride + offset % row
            w.store_shared(place, words, where=there)
        for offset, there, words in self.mean:
            w.store_shared(at.staged_mean + offset, words, where=there)
        w.sync_block()


def read_query(w: Warp, number: Register, pairs: range, at: Places, plan: Plan) -> list[Register]:
    """Words (p, p + H / 2) of a query, zeros where there is none: of p = first + t for each `first` of some pairs."""
    odd, there = (at.t & 1) > 0, number < plan.group
    number = w.select(there, number, w.integer(0))
    start = at.staged_queries + number * plan.query_stride + ((at.t >> 1) << 2)
    words = []
    for pair in pairs:  # channels pair + t and pair + t + H / 2, each with a neighbour
        low, high = (w.load_shared(start, 1, 2 * (pair + i * plan.pairs))[0] for i in range(2))
        word = w.select(odd, w.pick_halves(low, high, 1), w.pick_halves(low, high, 0))
        words.append(w.select(there, word, w.integer(0)))
    return words


def read_mean(w: Warp, offset: Register, pairs: range, at: Places, plan: Plan) -> list[list[Register]]:
    """Low and high channel of the mean key's pairs: of those that lie `offset` bytes behind each of some pairs."""
    places = [[4 * (pair + i * plan.pairs) for i in range(2)] for pair in pairs]
    return [[w.as_float(w.load_shared(at.staged_mean + offset, 1, x)[0]) for x in both] for both in places]
