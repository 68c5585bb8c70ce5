"""Codes of 8, 4 or 2 bits without a bitmap, which a warp multiplies as they stand.

A float16 whose exponent bits are zero is subnormal: its value is n * 2 ** -24 exactly, n the number in its other bits. So
what a mask leaves of a word of codes, as `layout.to_operands` arranges them, is an operand of a product. Codes that stand
higher in their half count so many times as much, which the rows' factors or the other operand take back. What is
subtracted from a code n to get its level, n - middle, is subtracted from sums.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mustafar_jax.pallas_kernels.mosaic.plan import Plan
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp

BITS = (8, 4, 2)
"""Of codes that can be multiplied so."""

UNIT = 2.0**24
"""What a code of 1, as an operand, is to be multiplied by."""


def operands(w: Warp, words: Sequence[Register], bits: int) -> list[list[Register]]:
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


def scales(w: Warp, words: Sequence[Register]) -> list[Register]:
    """Two words of bfloat16 scales as float32: of tokens g, g + 8, g + 16 and g + 24."""
    return [w.as_float(x) for word in words for x in (word << 16, word & 0xFFFF0000)]


_ROOM = 6.0
"""Weights of codes may be 2 ** 6 times as large as others, so that small ones lose less in float16."""

_LEAST = -96.0
"""Row scales below 2 ** -96 count as this for the running maximum: all sums of weights then fit float32."""


def raised(w: Warp, scores: Sequence[Sequence[Register]], scales: Sequence[Register]) -> list[list[Register]]:
    """Scores [..][4 tokens] to base 2 with the logarithm of each token's scale, if there are any: what the running
    maximum is of, so that weights times scales stay within float16.
    """
    if not scales:
        return [list(x) for x in scores]
    logs = [w.maximum(w.log2(scale), w.number(_LEAST)) - _ROOM for scale in scales]
    return [[x + log for x, log in zip(of_tokens, logs, strict=True)] for of_tokens in scores]


def scaled(w: Warp, weights: Iterable[Sequence[Register]], scales: Sequence[Register], bits: int) -> list[Register]:
    """Weights of two heads for each of 4 tokens, times the tokens' scales, in float16."""
    less = 1 / times_of_inner(bits)  # tokens 1 and 3 stand in the last places of a product's inner axis
    scales = [x * less if i % 2 and less != 1 else x for i, x in enumerate(scales)]
    return [w.pack_pair(*(x * scale for x in pair), float16=True) for pair, scale in zip(weights, scales, strict=True)]


def multiply_keys(w: Warp, words: Sequence[Register], query: Sequence[Register], plan: Plan) -> list[Register]:
    """Products of queries with a unit's keys, [octets][2][4]: codes of 16 tokens each, as rows."""
    of_tiles, tiles = operands(w, words, plan.key.bits), plan.tiles
    sums = [[[w.number(0)] * 4] * 2 for _ in range(plan.octets)]
    for tile in range(tiles):
        for octet, parts in enumerate(sums):
            columns = query[2 * (octet * tiles + tile) :][:2]
            for half in range(2):
                parts[half] = w.multiply_add(of_tiles[half * tiles + tile], columns, parts[half], float16=True)
    return [x for parts in sums for part in parts for x in part]


def scores(w: Warp, sums: Sequence[Register], scales: Sequence[Register], factors: Sequence[Register], plan: Plan) -> list[Register]:
    """Scores [octets][4 tokens][2 heads] of these products; factors as `CodedQuery.factors` gives them."""
    found, times = [], 1 / times_of_rows(plan.key.bits)
    for i, x in enumerate(sums):
        octet, token, head = i // 8, i // 2 % 4, i % 2
        a, b = factors[4 * octet + 2 * head :][:2]
        found.append(w.fused(x, a * times if token % 2 else a, b) * scales[token])
    return found


def add_values(w: Warp, out: list[list[list[Register]]], words: Sequence[Register], weights: Sequence[Register], plan: Plan) -> None:
    """Add weights times a unit's codes to the sums: 16 tokens at a time; rows are channels.

    The last sum is of the weights themselves, a product with ones, which `without_middle` needs.
    """
    of_tiles, tiles, ones = operands(w, words, plan.value.bits), plan.tiles, _ones(w, plan.value.bits)
    for half in range(2):
        for octet in range(plan.octets):
            columns = weights[4 * octet + 2 * half :][:2]
            for tile, rows in enumerate([*of_tiles[half * tiles :][:tiles], ones]):
                out[tile][octet] = w.multiply_add(rows, columns, out[tile][octet], float16=True)


def _ones(w: Warp, bits: int) -> list[Register]:
    """An operand of ones, as many times as large as codes are."""
    first, last = (w.integer(int(np.float16(x).view(np.uint16)) * 0x00010001) for x in (1, times_of_inner(bits)))
    return [first, first, last, last]


def without_middle(w: Warp, out: list[list[list[Register]]], bits: int) -> list[list[list[Register]]]:
    """Sums of levels, of the sums of codes that `add_values` leaves."""
    *sums, ones = out
    units = (UNIT, UNIT / times_of_rows(bits))
    less = [[x * -middle(bits) for x in of_heads] for of_heads in ones]
    return [
        [[w.fused(x, w.number(units[i // 2]), off[i % 2]) for i, x in enumerate(part)] for part, off in zip(tile, less, strict=True)]
        for tile in sums
    ]
