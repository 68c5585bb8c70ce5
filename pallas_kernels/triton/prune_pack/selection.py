"""The largest entries of each token, found by bit planes.

A token's 16-bit entries are first transposed to bit planes, words of 32 channels each, and the planes are walked from
the highest bit: of the candidates, those that have the bit are either all kept or all that remain, which counting them
tells. The whole search works on bitmap words, costs the same for all data, and ends with the bitmap. Entries of equal
magnitude are told apart by seven planes more, which hold the channel's number.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.layout import WORD
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.prune_pack.program import THREAD_WORDS, Plan


def largest(columns: list[list[jax.Array]], part: jax.Array, plan: Plan) -> list[jax.Array]:
    """The bitmap words of the `kept` largest magnitudes, the lowest channel first among equals.

    They come twice, since a row of four columns is what `fuse` gives for rows of four.

    Args:
        columns: a thread's entries.
        part: see `part_of`.
        plan: of the kernel.
    """
    merge = functools.partial(tl.merge_bits, interpret=plan.interpret)
    ahead = [jnp.zeros_like(part)] * THREAD_WORDS  # kept for sure
    level = [jnp.full_like(part, -1)] * THREAD_WORDS  # equal to each other in all planes so far
    for plane in _planes([word for words in columns for word in words], part, plan):
        higher = [a | (c & p) for a, c, p in zip(ahead, level, plane, strict=True)]
        count = _sum_over_parts(functools.reduce(jnp.add, map(lax.population_count, higher)), plan)
        enough = plan.kept - 1 - count >> 31  # all ones where the last one that is kept has the plane's bit
        ahead = [merge(a, h, enough) for a, h in zip(ahead, higher, strict=True)]
        level = [c & ~(p ^ enough) for c, p in zip(level, plane, strict=True)]
    return [a | c for a, c in zip(ahead, level, strict=True)] * 2  # one is left in `level`, since all keys differ


def _planes(entries: list[jax.Array], part: jax.Array, plan: Plan) -> Iterator[list[jax.Array]]:
    """The bits of the entries' keys from the highest: [plane][bitmap word].

    A key is the magnitude's bits, in which all NaN are one value above infinity, then the channel's number, inverted.
    """
    by_word = [_bit_planes(entries[i : i + WORD // 2], plan) for i in (0, WORD // 2)]
    planes = [list(plane) for plane in zip(*by_word, strict=True)]
    mantissa = int(jnp.finfo(plan.dtype).nmant)
    is_nan = [
        functools.reduce(jnp.bitwise_and, word[mantissa:15]) & functools.reduce(jnp.bitwise_or, word[:mantissa])
        for word in by_word
    ]
    yield from reversed(planes[mantissa:15])
    yield is_nan
    for plane in reversed(planes[:mantissa]):
        yield [bits & ~nan for bits, nan in zip(plane, is_nan, strict=True)]
    full, empty = jnp.full_like(is_nan[0], -1), jnp.zeros_like(is_nan[0])
    yield [full, empty]
    if plan.parts == 2:
        yield [part - 1] * THREAD_WORDS
    for mask in (0x0000FFFF, 0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555):
        yield [full & mask] * THREAD_WORDS


def _bit_planes(words: list[jax.Array], plan: Plan) -> list[jax.Array]:
    """32 entries in 16 words -> 16 words, word b holding the entries' bits b in the channels' order."""
    low: list[jax.Array] = []
    high: list[jax.Array] = []
    pick = functools.partial(tl.permute_bytes, interpret=plan.interpret)
    for a, b, c, d in (words[i::4] for i in range(4)):
        for of_channel in (0x5140, 0x7362):  # two channels' bytes: low, low, high, high
            front, back = pick(a, b, of_channel), pick(c, d, of_channel)
            low.append(pick(front, back, 0x5410))
            high.append(pick(front, back, 0x7632))
    return _transpose_bits(low, plan) + _transpose_bits(high, plan)


def _transpose_bits(words: list[jax.Array], plan: Plan) -> list[jax.Array]:
    """8 words -> 8 words: bit i of every byte of word j becomes bit j of that byte of word i."""
    words = list(words)
    merge = functools.partial(tl.merge_bits, interpret=plan.interpret)
    for distance, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for i in (i for i in range(8) if not i & distance):
            a, b = words[i], words[i + distance]
            words[i], words[i + distance] = merge(a, b << distance, mask), merge(a >> distance, b, mask)
    return words


def _sum_over_parts(x: jax.Array, plan: Plan) -> jax.Array:
    """Sums over a token's threads, in each of them."""
    return x if plan.parts == 1 else x + tl.from_neighbour(x, interpret=plan.interpret)
