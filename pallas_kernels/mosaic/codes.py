"""Codes of 8, 4 or 2 bits without a bitmap, which a warp multiplies as they stand.

A float16 whose exponent bits are zero is subnormal: its value is n * 2 ** -24 exactly, n the number in its other bits.
So what a mask leaves of a word of codes, as `layout.to_operands` arranges them, is an operand of a product. Codes that
stand higher in their half count so many times as much, which the rows' factors or the other operand take back. A code n
stands for n - `middle`, times its row's scale: the middle is subtracted from sums, and scales go on scores and weights.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mustafar_jax.pallas_kernels.mosaic.plan import Plan
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp

BITS = (8, 4, 2)
"""Of codes that can be multiplied so."""

UNIT = 2.0**24
"""What a code of 1, as an operand, is to be multiplied by."""

_ROOM = 6.0
"""Weights of codes may be 2 ** 6 times as large as others, so that small ones lose less in float16."""

_LEAST = -96.0
"""Row scales below 2 ** -96 count as this for the running maximum: all sums of weights then fit float32."""


def operands(words: Sequence[Register], bits: int) -> list[list[Register]]:
    """A lane's words of codes as operands of `Warp.multiply_add`, tile after tile.

    Rows g + 8 of an operand are `times_of_rows` too large, the last 8 places of its inner axis `times_of_inner`.
    """
    mask = (2**bits - 1) * 0x00010001
    pairs = [half & (mask << place) for x in words for half in (x, x >> 8) for place in range(0, 8, bits)]
    return [pairs[i : i + 4] for i in range(0, len(pairs), 4)]


def times_of_rows(bits: int) -> int:
    """How many times as much codes of rows g + 8 count: they are the second of four pairs."""
    return 1 << bits % 8


def times_of_inner(bits: int) -> int:
    """How many times as much codes of the last 8 places of the inner axis count: they are the third of four pairs."""
    return 1 << 2 * bits % 8


def middle(bits: int) -> float:
    """The code that would stand for 0."""
    return (2**bits - 1) / 2


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
    less, found = 1 / times_of_rows(plan.key.bits), []
    for i, x in enumerate(products):
        octet, token, head = i // 8, i // 2 % 4, i % 2
        unit, offset = factors[4 * octet + 2 * head :][:2]
        found.append(w.fused(x, unit * less if token % 2 else unit, offset) * scales[token])
    return found


def raised(w: Warp, scores: Sequence[Sequence[Register]], scales: Sequence[Register]) -> list[list[Register]]:
    """Scores [..][4 tokens] to base 2, and with them the logarithms of the tokens' scales, if there are any.

    The running maximum is of these, so that weights times scales stay within float16.
    """
    if not scales:
        return [list(x) for x in scores]
    logs = [w.maximum(w.log2(scale), w.number(_LEAST)) - _ROOM for scale in scales]
    return [[x + log for x, log in zip(of_tokens, logs, strict=True)] for of_tokens in scores]


def scaled(w: Warp, weights: Iterable[Sequence[Register]], scales: Sequence[Register], bits: int) -> list[Register]:
    """Weights of two heads for each of 4 tokens, times the tokens' scales, in float16.

    Tokens 1 and 3 stand in the last places of a product's inner axis.
    """
    less = [1, 1 / times_of_inner(bits)] * 2
    factors = [scale if x == 1 else scale * x for scale, x in zip(scales, less, strict=True)]
    return [w.pack_pair(*(x * y for x in pair), float16=True) for pair, y in zip(weights, factors, strict=True)]


def add_values(
    w: Warp, out: list[list[list[Register]]], words: Sequence[Register], weights: Sequence[Register], plan: Plan
) -> None:
    """Add weights, as `scaled` and `Warp.transpose` leave them, times a unit's codes to sums, whose rows are channels.

    The last sum is of the weights themselves, a product with ones, for `without_middle`. A unit's products begin with
    zeros: a tensor core cuts sums off, always towards zero, which a long sum would feel.
    """
    of_tiles, tiles, ones = operands(words, plan.value.bits), plan.tiles, _ones(w, plan.value.bits)
    for octet in range(plan.octets):
        columns = [weights[4 * octet + 2 * half :][:2] for half in range(2)]
        for tile, sums in enumerate(out):
            rows = [ones] * 2 if tile == tiles else [of_tiles[tile], of_tiles[tiles + tile]]
            product = [w.number(0)] * 4
            for half in range(2):
                product = w.multiply_add(rows[half], columns[half], product, float16=True)
            sums[octet] = [x + y for x, y in zip(sums[octet], product, strict=True)]


def _ones(w: Warp, bits: int) -> list[Register]:
    """An operand of ones, as much too large in its inner axis as codes are."""
    first, last = (w.integer(int(np.float16(x).view(np.uint16)) * 0x00010001) for x in (1, times_of_inner(bits)))
    return [first, first, last, last]


def without_middle(w: Warp, out: list[list[list[Register]]], bits: int) -> list[list[list[Register]]]:
    """Sums of levels [tiles][octets][4], of the sums that `add_values` leaves."""
    *tiles, ones = out
    units = [w.number(UNIT / times) for times in (1, 1, times_of_rows(bits), times_of_rows(bits))]
    less = [[x * -middle(bits) for x in of_heads] for of_heads in ones]
    return [
        [
            [w.fused(*numbers) for numbers in zip(part, units, off, strict=True)]
            for part, off in zip(tile, less, strict=True)
        ]
        for tile in tiles
    ]
