"""Queries as products with coded keys want them: turned as the keys are, scaled, in float16.

A query is scaled by a power of two that puts its largest entry from 2 ** 14 to 2 ** 15: nothing overflows, and what is
lost below float16's normal numbers is 2 ** -39 of the largest entry.
"""

import functools
from typing import Any

from mustafar_jax.pallas_kernels.mosaic import codes, hadamard
from mustafar_jax.pallas_kernels.mosaic.plan import Places, Plan
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp

_LARGEST = 14
_BIAS = 127


class CodedQuery:
    """The queries of a block's KV head, which its warps share."""

    def __init__(self, w: Warp, at: Places, plan: Plan) -> None:
        self.w, self.at, self.plan = w, at, plan

    def share(self) -> None:
        """Leave the queries in the block's memory, the last warps first: the first ones have more to do for a mean."""
        w, plan = self.w, self.plan
        for first in range(0, plan.group, plan.warps):
            number = w.integer(plan.warps - 1 + first) - w.warp()
            w.branch(number < plan.group, [], functools.partial(self._store, number))

    def _store(self, number: Register, _: list[Register]) -> list[Register]:
        """One query: neighbouring channels in each lane."""
        w, plan = self.w, self.plan
        channels = plan.head_dim // LANES
        own = w.lane() * (2 * channels)
        words = w.load_shared(self.at.staged_queries + number * plan.query_stride + own, channels // 2)
        x = [y for word in words for y in w.unpack_pair(word)]
        x = hadamard.turn(w, x) if plan.turned_keys else x
        down, up = self._powers(x)
        x = [y * down for y in x]
        last = (own & 16) > 0  # of 16 channels the last 8: see `codes.operands`
        factors = codes.Factors.of(plan.key)
        less = w.select(last, w.number(1 / factors.inner), w.number(1))
        place = self.at.coded_queries + number * plan.query_stride
        w.store_shared(place + own, self._halves([y * less for y in x]))
        rounded = [y for word in self._halves(x) for y in w.unpack_pair(word, float16=True)]
        total = self._over_lanes(functools.reduce(lambda a, b: a + b, rounded), lambda a, b: a + b)
        unit = up * plan.scale
        offset = total * (unit * -factors.middle)
        w.store_shared(place, [unit * factors.unit, offset], plan.head_dim * 2, where=w.lane() == 0)
        return []

    def _powers(self, x: list[Register]) -> tuple[Register, Register]:
        """The power of two that scales a query, and its inverse."""
        w = self.w
        sizes = [w.as_float(w.as_bits(y) & 0x7FFFFFFF) for y in x]
        largest = self._over_lanes(functools.reduce(w.maximum, sizes), w.maximum)
        least = w.integer(_LARGEST + 1)
        exponent = w.as_bits(largest) >> 23
        exponent = w.select(exponent < least, least, exponent)
        down, up = w.integer(2 * _BIAS + _LARGEST) - exponent, exponent - _LARGEST
        return w.as_float(down << 23), w.as_float(up << 23)

    def _halves(self, x: list[Register]) -> list[Register]:
        return [self.w.pack_pair(*x[i : i + 2], float16=True) for i in range(0, len(x), 2)]

    def _over_lanes(self, x: Register, combine: Any) -> Register:
        for distance in (1, 2, 4, 8, 16):
            x = combine(x, self.w.shuffle(x, self.w.lane() ^ distance))
        return x

    def fragments(self) -> list[Register]:
        """Words [octets][tiles][2] of head g: of each tile's channels 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9."""
        at, plan = self.at, self.plan
        rows = [self._place(at.g + 8 * octet) + (at.t << 2) for octet in range(plan.octets)]
        return [self.w.load_shared(row, 1, 16 * i)[0] for row in rows for i in range(2 * plan.tiles)]

    def tile_fragments(self) -> list[Register]:
        """Words of head g as `Products.load_query` gives them: channels p and p + H / 2."""
        w, at, plan = self.w, self.at, self.plan
        odd, words = (at.t & 1) > 0, []
        for octet in range(plan.octets):
            row = self._place(at.g + 8 * octet) + ((at.t >> 1) << 2)
            for pair in range(0, plan.pairs, 4):
                low, high = (w.load_shared(row, 1, 2 * (pair + i * plan.pairs))[0] for i in range(2))
                words.append(w.select(odd, w.pick_halves(low, high, 1), w.pick_halves(low, high, 0)))
        return words

    def factors(self) -> list[Register]:
        """(a, b) [octets][2] of heads 2 t and 2 t + 1: a product with codes times a, plus b, times its row's scale."""
        w, at, plan = self.w, self.at, self.plan
        heads = [(at.t << 1) + (8 * octet + i) for octet in range(plan.octets) for i in range(2)]
        words = [w.load_shared(self._place(head), 2, 2 * plan.head_dim) for head in heads]
        return [w.as_float(x) for pair in words for x in pair]

    def _place(self, number: Register) -> Register:
        """Of a query, or of the last one for those that there are none of."""
        w, plan = self.w, self.plan
        number = w.select(number < plan.group, number, w.integer(plan.group - 1))
        return self.at.coded_queries + number * plan.query_stride
