"""Codes of 8, 4 or 2 bits, which a warp multiplies as they stand, and those of 4 bits behind a bitmap.

A float16 whose exponent bits are zero is subnormal: its value is n * 2 ** -24 exactly, n the number in its other bits.
So what a mask leaves of a word of codes, as `layout.to_operands` arranges them, is an operand of a product. Codes that
stand higher in their half count so many times as much, which the rows' factors or the other operand take back. A code n
stands for n - `middle`, times its row's scale: the middle is subtracted from sums, and scales go on scores and weights.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from mustafar_jax.pallas_kernels.mosaic.plan import Layout, Plan
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp

WHOLE = frozenset({(False, 8), (False, 4), (False, 2)})
"""Codes that can be multiplied so: (whether they stand behind a bitmap, bits)."""

KEYS = WHOLE | {(True, 4)}
"""Codes that keys can be."""

_ROOM = 6.0
"""Weights of codes may be 2 ** 6 times as large as others, so that small ones lose less in float16."""

_LEAST = -96.0
"""Row scales below 2 ** -96 count as this for the running maximum: all sums of weights then fit float32."""


def operands(words: Sequence[Register], bits: int) -> list[list[Register]]:
    """A lane's words of codes as operands of `Warp.multiply_add`, tile after tile.

    What stands higher in a half counts as much more: see `Factors`.
    """
    mask = (2**bits - 1) * 0x00010001
    pairs = [half & (mask << place) for x in words for half in (x, x >> 8) for place in range(0, 8, bits)]
    return [pairs[i : i + 4] for i in range(0, len(pairs), 4)]


def magnitudes(words: Sequence[Register]) -> list[tuple[Register, int]]:
    """Codes of 4 bits of `codecs.SignMagnitude`, in order, as float16 numbers in the halves of registers.

    The sign goes to bit 15 and the code above, plus 1, to bit 9: a small number of floating point.
    """
    entries = []
    for word in words:
        numbers = []
        for place in range(0, 16, 4):
            magnitude = (word << 9 - place if place < 9 else word >> place - 9) & 0x0E000E00
            numbers.append((magnitude | (word << 12 - place) & 0x80008000) + 0x02000200)
        entries += [(number, half) for half in (0, 1) for number in numbers]
    return entries


@dataclasses.dataclass(frozen=True)
class Factors:
    """What codes as operands are to what they stand for, but for their rows' scales. Static.

    Attributes:
        unit: what an operand is to be multiplied by.
        middle: what is to be subtracted then.
        rows: how many times as much rows g + 8 of an operand count.
        inner: the same of the last 8 places of its inner axis.
    """

    unit: float
    middle: float = 0.0
    rows: int = 1
    inner: int = 1

    @staticmethod
    def of(layout: Layout) -> "Factors":
        """Of a layout's codes: of `operands`, in each of which four pairs follow each other, or of `magnitudes`."""
        bits = layout.bits
        if not layout.is_direct:
            return Factors(2.0**14)
        return Factors(2.0**24, (2**bits - 1) / 2, rows=1 << bits % 8, inner=1 << 2 * bits % 8)


def row_scales(w: Warp, words: Sequence[Register]) -> list[Register]:
    """Two words of bfloat16 scales as float32: of tokens g, g + 8, g + 16 and g + 24."""
    return [w.as_float(x) for word in words for x in (word << 16, word & 0xFFFF0000)]


def multiply_keys(w: Warp, words: Sequence[Register], query: Sequence[Register], plan: Plan) -> list[Register]:
    """Products [octets][2][4] of queries, as `CodedQuery.fragments` gives them, with a unit's keys: 16 tokens a row."""
    of_tiles, tiles = operands(words, plan.key.bits), plan.tiles
    sums = [[[w.number(0)] * 4] * 2 for _ in range(plan.octets)]
    for tile in range(tiles):
        for octet, parts in enumerate(sums):
            columns = query[2 * (octet * tiles + tile) :][:2]
            for half in range(2):
                parts[half] = w.multiply_add(of_tiles[half * tiles + tile], columns, parts[half], float16=True)
    return [x for parts in sums for part in parts for x in part]


def scores(
    w: Warp, products: Sequence[Register], scales: Sequence[Register], factors: Sequence[Register], plan: Plan
) -> list[Register]:
    """Scores [octets][4 tokens][2 heads] of these products; factors as `CodedQuery.factors` gives them."""
    less, found = 1 / Factors.of(plan.key).rows, []
    for i, x in enumerate(products):
        octet, token, head = i // 8, i // 2 % 4, i % 2
        unit, offset = factors[4 * octet + 2 * head :][:2]
        unit = unit * less if token % 2 and less < 1 else unit
        found.append(w.fused(x, unit, offset) * scales[token])
    return found


def raised(w: Warp, scores: Sequence[Sequence[Register]], scales: Sequence[Register]) -> list[list[Register]]:
    """Scores [..][4 tokens] to base 2, and with them the logarithms of the tokens' scales, if there are any.

    The running maximum is of these, so that weights times scales stay within float16.
    """
    if not scales:
        return [list(x) for x in scores]
    logs = [w.maximum(w.log2(scale), w.number(_LEAST)) - _ROOM for scale in scales]
    return [[x + log for x, log in zip(of_tokens, logs, strict=True)] for of_tokens in scores]


def scaled(w: Warp, weights: Iterable[Sequence[Register]], scales: Sequence[Register], plan: Plan) -> list[Register]:
    """Weights of two heads for each of 4 tokens, times the tokens' scales, in float16.

    Tokens 1 and 3 stand in the last places of a product's inner axis.
    """
    less = [1, 1 / Factors.of(plan.value).inner] * 2
    factors = [scale if x == 1 else scale * x for scale, x in zip(scales, less, strict=True)]
    return [w.pack_pair(*(x * y for x in pair), float16=True) for pair, y in zip(weights, factors, strict=True)]


def add_values(
    w: Warp, out: list[list[list[Register]]], words: Sequence[Register], weights: Sequence[Register], plan: Plan
) -> None:
    """Add weights, as `scaled` and `Warp.transpose` leave them, times a unit's codes to sums, whose rows are channels.

    The last sum is of the weights themselves, a product with ones, for `without_middle`. A unit's products begin with
    zeros: a tensor core cuts sums off, always towards zero, which a long sum would feel.
    """
    of_tiles, tiles, ones = operands(words, plan.value.bits), plan.tiles, _ones(w, plan)
    for octet in range(plan.octets):
        columns = [weights[4 * octet + 2 * half :][:2] for half in range(2)]
        for tile, sums in enumerate(out):
            rows = [ones] * 2 if tile == tiles else [of_tiles[tile], of_tiles[tiles + tile]]
            product = [w.number(0)] * 4
            for half in range(2):
                product = w.multiply_add(rows[half], columns[half], product, float16=True)
            sums[octet] = [x + y for x, y in zip(sums[octet], product, strict=True)]


def _ones(w: Warp, plan: Plan) -> list[Register]:
    """An operand of ones, as much too large in its inner axis as codes are."""
    numbers = (1, Factors.of(plan.value).inner)
    first, last = (w.integer(int(np.float16(x).view(np.uint16)) * 0x00010001) for x in numbers)
    return [first, first, last, last]


def without_middle(w: Warp, out: list[list[list[Register]]], plan: Plan) -> list[list[list[Register]]]:
    """Sums of levels [tiles][octets][4], of the sums that `add_values` leaves."""
    *tiles, ones = out
    factors = Factors.of(plan.value)
    units = [w.number(factors.unit / times) for times in (1, 1, factors.rows, factors.rows)]
    less = [[x * -factors.middle for x in of_heads] for of_heads in ones]
    return [
        [
            [w.fused(*numbers) for numbers in zip(part, units, middle, strict=True)]
            for part, middle in zip(tile, less, strict=True)
        ]
        for tile in tiles
    ]
