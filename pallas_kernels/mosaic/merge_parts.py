"""What a warp adds to a merge: attention over a tile of dense slots, and its share of the splits."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mustafar_jax.pallas_kernels.mosaic.merge_plan import TILE, Plan
from mustafar_jax.pallas_kernels.mosaic.products import LOWEST
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp


class Part(NamedTuple):
    """Softmax over some tokens, unnormalised, relative to m, a score to base 2, LOWEST or larger.

    Of one query head, the same m and l in all lanes, out in any order; or of the block's query heads, where lane 4 g +
    t has m and l of head g, and out [H / 16][4] of heads 2 t and 2 t + 1 as `attend_tile` says.
    """

    m: Register
    l: Register  # noqa: E741
    out: list[Register]


def combined(w: Warp, parts: Sequence[Part]) -> Part:
    """Parts of one query head in one."""
    m = functools.reduce(w.maximum, [part.m for part in parts])
    weights = [w.exp2(part.m - m) for part in parts]
    total, *out = (
        functools.reduce(lambda a, b: a + b, [x * weight for x, weight in zip(numbers, weights, strict=True)])
        for numbers in zip(*([part.l, *part.out] for part in parts), strict=True)
    )
    return Part(m, total, out)


class Slots:
    """The dense slots of one KV head, of which a warp takes every `warps`-th tile."""

    def __init__(
        self, w: Warp, query: Any, key: Any, value: Any, length: Register, packed: Register, plan: Plan
    ) -> None:
        self.w, self.plan = w, plan
        self.query, self.key, self.value = query, key, value  # where the block's rows begin
        self.length, self.packed = length, packed
        self.g, self.t = w.lane() >> 2, w.lane() & 3

    def attend(self) -> Part:
        """Attend the warp's tiles; there is at least one."""
        w, plan = self.w, self.plan
        first = self.attend_tile(w.warp())
        if plan.tiles <= plan.warps:
            return first

        def add_tile(tile: Register, carry: list[Register]) -> list[Register]:
            m, l, *out = carry  # noqa: E741
            m, l, out = self._merged(Part(m, l, out), self.attend_tile(tile))  # noqa: E741
            return [m, l, *out]

        carry = [first.m, first.l, *first.out]
        m, l, *out = w.loop(w.warp() + plan.warps, w.integer(plan.tiles), plan.warps, carry, add_tile)  # noqa: E741
        return Part(m, l, out)

    def attend_tile(self, tile: Register) -> Part:
        """Attend 16 slots.

        A product with keys has query heads as rows, each twice, and 8 slots as columns; lane (g, t) reads of either 16
        bytes, number 4 i + t of row g. One with values has channels as rows, 16 slots as its inner axis, and query
        heads as columns; the lane reads 16 bytes, number 8 i + g, of the 4 slots that it has scores of.
        """
        w, plan = self.w, self.plan
        pieces, first = plan.head_dim // 32, tile * TILE
        head = w.select(self.g < plan.queries, self.g, w.integer(plan.queries - 1))
        query = self._load(self.query, head, self.t, pieces)
        keys = [self._load(self.key, self._there(first + self.g + 8 * half), self.t, pieces) for half in range(2)]
        own = [first + (self.t << 1) + n for n in (0, 1, 8, 9)]
        values = [self._load(self.value, self._there(slot), self.g, pieces // 2) for slot in own]
        w.sync_warp()  # all are on their way
        visible = [self._is_visible(slot) for slot in own]
        scores = [x for words in keys for x in self._scores(query, words)]
        scores = [w.select(seen, x * plan.scale, w.number(-math.inf)) for seen, x in zip(visible, scores, strict=True)]
        m = w.maximum(self._over_quad(functools.reduce(w.maximum, scores), w.maximum), w.number(LOWEST))
        weights = [w.exp2(x - m) for x in scores]
        l = self._over_quad(functools.reduce(lambda a, b: a + b, weights), lambda a, b: a + b)  # noqa: E741
        # what does not fit into 16 bits has a product of its own
        high = [w.pack_pair(*weights[i : i + 2]) for i in (0, 2)]
        rest = [x - y for x, y in zip(weights, [y for pair in high for y in w.unpack_pair(pair)], strict=True)]
        low = [w.pack_pair(*rest[i : i + 2]) for i in (0, 2)]
        out: list[Register] = []
        for of_slots in zip(*values, strict=True):
            a, b, c, d = (w.select(seen, x, w.integer(0)) for seen, x in zip(visible, of_slots, strict=True))
            channels = [w.pick_halves(*pair, half) for pair in ((a, b), (c, d)) for half in (0, 1)]
            out += w.multiply_add(channels, low, w.multiply_add(channels, high, [w.number(0)] * 4))
        return Part(m, l, out)

    def publish(self, part: Part, place: Register) -> None:
        """Leave a part in shared memory: of channels 64 i + 8 g to 64 i + 8 g + 7, two at a time, of two heads each."""
        w, plan = self.w, self.plan
        where = (self.t == 0) & (self.g < plan.queries)
        w.store_shared(place + self.g * plan.row_bytes, [part.m, part.l], plan.head_dim * 4, where=where)
        row = place + (self.t << 1) * plan.row_bytes + (self.g << 5)
        for i in range(min(2, plan.queries)):
            where = (self.t << 1) + i < plan.queries
            for n in range(0, len(part.out), 8):
                x = part.out[n + i : n + 8 : 2]
                w.store_shared(row, x, i * plan.row_bytes + n // 16 * 256 + n % 16 * 2, where=where)

    def _load(self, ref: Any, row: Register, piece: Register, pieces: int) -> list[Register]:
        """Words of a row: pieces of 16 bytes, evenly apart, from one on."""
        step = self.plan.head_dim * 2 // pieces
        offset = row * (self.plan.head_dim * 2) + (piece << 4)
        return [x for i in range(pieces) for x in self.w.load(ref, offset, 4, i * step, early=True)]

    def _there(self, slot: Register) -> Register:
        """A slot, or the last one for what is beyond."""
        return self.w.select(slot < self.plan.slots, slot, self.w.integer(self.plan.slots - 1))

    def _is_visible(self, slot: Register) -> Register:
        """The ring's oldest token is at position sinks + packed, in slot packed % ring of it."""
        w, plan = self.w, self.plan
        age = (slot + plan.ring - self.packed % plan.ring - plan.sinks) % plan.ring
        position = w.select(slot < plan.sinks, slot, self.packed + age + plan.sinks)
        visible = (slot < plan.slots) & (position < self.length)
        return visible if plan.window is None else visible & (position + (plan.window + 1) > self.length)

    def _scores(self, query: list[Register], words: list[Register]) -> list[Register]:
        """Products of head g with slots 2 t and 2 t + 1 of 8, not scaled; in two sums, so that each waits less."""
        w = self.w
        sums = [[w.number(0)] * 4] * 2
        for i in range(0, len(words), 2):
            a, b = query[i : i + 2]
            sums[i // 2 % 2] = w.multiply_add([a, a, b, b], words[i : i + 2], sums[i // 2 % 2])
        return [x + y for x, y in zip(sums[0][:2], sums[1][:2], strict=True)]

    def _over_quad(self, x: Register, combine: Callable[[Register, Register], Register]) -> Register:
        """x of the four lanes of one g combined, in all of them."""
        for distance in (1, 2):
            x = combine(x, self.w.shuffle(x, self.w.lane() ^ distance))
        return x

    def _merged(self, one: Part, other: Part) -> Part:
        """Two parts of all query heads in one."""
        w = self.w
        m = w.maximum(one.m, other.m)
        a, b = (w.exp2(x - m) for x in (one.m, other.m))
        # of heads 2 t and 2 t + 1
        of_out = [[w.shuffle(x, (self.t << 3) + 4 * i) for i in range(2)] for x in (a, b)]
        out = [
            x * of_out[0][n % 2] + y * of_out[1][n % 2] for n, (x, y) in enumerate(zip(one.out, other.out, strict=True))
        ]
        return Part(m, one.l * a + other.l * b, out)


class Splits:
    """The splits of a block's query heads, of which a warp takes every `warps`-th; all its lanes read one row."""

    def __init__(self, w: Warp, refs: Sequence[Any], head: Register, share: Register, plan: Plan) -> None:
        self.w, self.plan = w, plan
        self.words = plan.head_dim // LANES  # of a row, that a lane has
        sizes = (plan.head_dim, 1, 1)
        self.refs = [w.row(x, head, plan.splits * plan.group * size * 4) for x, size in zip(refs, sizes, strict=True)]
        self.first = share * plan.queries

    def load(self, split: Register) -> list[Register]:
        """Begin to load a split and those that the warp takes with it; undefined beyond the last one."""
        w, plan = self.w, self.plan
        out, *statistics = self.refs
        vector = next(n for n in (4, 2, 1) if plan.queries % n == 0)
        loaded = []
        for _ in range(plan.splits_at_once):
            there, row = split < plan.splits, split * plan.group + self.first
            for ref in statistics:
                for n in range(0, plan.queries, vector):
                    loaded += w.load(ref, row << 2, vector, 4 * n, where=there, early=True)
            offset = row * (plan.head_dim * 4) + w.lane() * (self.words * 4)
            for n in range(plan.queries):
                loaded += w.load(out, offset, self.words, n * plan.head_dim * 4, where=there, early=True)
            split = split + plan.warps
        return loaded

    def merge(self, split: Register, loaded: list[Register]) -> list[Part]:
        """Merge a warp's splits, of which `loaded` are the first; a part of each query head."""
        w, plan = self.w, self.plan
        merged = [combined(w, parts) for parts in zip(*self._parts(split, loaded), strict=True)]
        at_once = plan.warps * plan.splits_at_once
        if plan.splits <= at_once:
            return merged

        def from_flat(carry: list[Register]) -> list[Part]:
            size = 2 + self.words
            rows = [carry[n : n + size] for n in range(0, len(carry), size)]
            return [Part(row[0], row[1], row[2:]) for row in rows]

        def flat(parts: list[Part]) -> list[Register]:
            return [x for part in parts for x in (part.m, part.l, *part.out)]

        def add(split: Register, carry: list[Register]) -> list[Register]:
            loaded = self.load(split)
            w.sync_warp()  # all are on their way
            more = self._parts(split, loaded)
            return flat([combined(w, parts) for parts in zip(from_flat(carry), *more, strict=True)])

        return from_flat(w.loop(split + at_once, w.integer(plan.splits), at_once, flat(merged), add))

    def publish(self, parts: list[Part], place: Register) -> None:
        """Leave a part of each query head in shared memory."""
        w, plan = self.w, self.plan
        for n, part in enumerate(parts):
            w.store_shared(place + w.lane() * (self.words * 4), part.out, n * plan.row_bytes)
            w.store_shared(place, [part.m, part.l], n * plan.row_bytes + plan.head_dim * 4, where=w.lane() == 0)

    def _parts(self, split: Register, loaded: list[Register]) -> list[list[Part]]:
        """What `load` has begun to load, of each split and query head; no tokens beyond the last split."""
        w, queries = self.w, self.plan.queries
        size = queries * (2 + self.words)
        found = []
        for start in range(0, len(loaded), size):
            there = split < self.plan.splits
            numbers = [w.select(there, w.as_float(x), w.number(0)) for x in loaded[start : start + size]]
            parts = []
            for n in range(queries):
                # half of the lowest number, to base 2, is still a number
                m = w.maximum(numbers[n], w.number(LOWEST / 2)) * math.log2(math.e)
                row = numbers[2 * queries + n * self.words :][: self.words]
                parts.append(Part(w.select(there, m, w.number(LOWEST)), numbers[queries + n], row))
            found.append(parts)
            split = split + self.plan.warps
        return found
