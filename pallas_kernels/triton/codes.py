"""Codes of 8, 4 or 2 bits without a bitmap, which a product takes as they stand.

A float16 whose exponent bits are zero is subnormal: its value is n * 2 ** -24 exactly, n the number in its other bits.
So what a mask leaves of a word of codes, as `layout.to_operands` arranges them, is a register of a product's operand.
Codes that stand higher in their half count so many times as much, which queries, weights or sums take back. A code n
stands for n - `middle`, times its row's scale: the middle is subtracted from sums, and scales go on scores and weights.

A tile is 128 tokens of one head. Its products have COLUMNS columns each, 8 to a warp. Of keys, each warp has 32 tokens,
and a product 8 of these; of values, each warp has its own 16 channels, or 32, and a product 8 of these.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.layout import TILE, WORD, coded_shape
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.tile import COLUMNS, ROWS, TOKENS, Order, Rotations, pick
from mustafar_jax.rows import Rows

WHOLE = frozenset({(False, 8), (False, 4), (False, 2)})
"""Codes that can be multiplied so: (whether they stand behind a bitmap, bits)."""

ORDER = Order((0, 8, 16, 24), lambda column: (column >> 3) * WORD + (column & 7))
"""Which tokens the products of keys take."""

DTYPE = jnp.float16
"""Of what is multiplied, whatever the cache's dtype."""

_WARPS = TOKENS // tl.WARP
_GROUPS = TOKENS // WORD
_LARGEST, _BIAS, _MANTISSA = 14, 127, 23

_ROOM = 10
"""Weights times scales may reach 2 ** 10, so that small ones lose less in float16."""

_LEAST = -96
"""Row scales below 2 ** -96 count as this for the running maximum: all sums of weights then fit float32."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """How a side is coded. Static.

    Attributes:
        bits: of a code.
        head_dim: 64 or 128.
        rows: S, a multiple of 32.
    """

    bits: int
    head_dim: int
    rows: int

    @classmethod
    def of(cls, rows: Rows) -> "Codes":
        """Of rows [B, K, S, H]."""
        assert rows.codec.bits is not None
        return cls(rows.codec.bits, rows.head_dim, rows.padded_length)

    @property
    def middle(self) -> float:
        """The code that would stand for 0."""
        return (2**self.bits - 1) / 2

    @property
    def units(self) -> tuple[float, float]:
        """What products are to be multiplied by: those of the first 8 rows of codes' tiles, and of the last."""
        return 2.0**24, 2.0**24 / (1 << self.bits % 8)

    @property
    def inner(self) -> float:
        """What the last 8 places of each 16 of the other operand are to be multiplied by."""
        return 1 / (1 << 2 * self.bits % 8)

    @property
    def tiles(self) -> int:
        """Tiles of 16 channels."""
        return self.head_dim // TILE

    @property
    def products(self) -> int:
        """Of a tile's values."""
        return self.head_dim // COLUMNS


def place_of(index: jax.Array) -> jax.Array:
    """The place of codes that stands at an index of a product's inner axis, 16 of them permuted.

    A thread has the places 8 i + 2 t + h of 16. Where an operand is stacked from pairs, the compiler gives a thread the
    indices 4 t + 2 i + h: so that no code moves, each stands at another index than its own, and what multiplies it too.
    """
    return index & ~15 | (index & 2) << 2 | index >> 1 & 6 | index & 1


def spread(codes: Codes, place: jax.Array) -> jax.Array:
    """What numbers at these places of codes on a product's inner axis are to be multiplied by, float32."""
    return jnp.where(place & 8, np.float32(codes.inner), np.float32(1))


def load_keys(ref: tl.Ref, index: jax.Array, codes: Codes) -> list[jax.Array]:
    """A tile's words, int32 [TOKENS, words] for either half of a warp's 32 tokens.

    Args:
        ref: int32 [S / 32 * H * bits].
        index: which tile. Past the end come other rows' codes.
        codes: how they are coded.
    """
    thread = jnp.arange(TOKENS, dtype=jnp.int32)
    _, count, lanes, vector = coded_shape(WORD, codes.head_dim, codes.bits)
    place = (_group(index * _GROUPS + (thread >> 5), codes) * (count * lanes) + (thread & 31)) * vector
    place = place[:, None] + jnp.arange(vector, dtype=jnp.int32)[None, :]
    chunks = [tl.load(ref.at[place + i * lanes * vector]) for i in range(count)]
    if count == 1:
        return [_stack(tl.unstack(chunks[0])[i : i + vector // 2]) for i in (0, vector // 2)]
    return [_stack(chunks[i : i + count // 2]) for i in (0, count // 2)]


def load_values(ref: tl.Ref, index: jax.Array, codes: Codes) -> list[jax.Array]:
    """The words of a tile that belong to a warp's channels, int32 [TOKENS, tiles of 16 tokens] each.

    Args:
        ref, index, codes: as in `load_keys`.
    """
    thread = jnp.arange(TOKENS, dtype=jnp.int32)
    _, count, lanes, vector = coded_shape(WORD, codes.head_dim, codes.bits)
    warp, lane = thread >> 5, thread & 31
    tiles = codes.tiles // _WARPS
    eighths = 2 * tiles * codes.bits  # of a word: what a warp has of each 16 tokens
    own, words = warp * eighths >> 3, max(2, eighths >> 3)
    loaded = []
    for step in range(TOKENS // TILE):
        group = _group(index * _GROUPS + step // 2, codes)
        first = step % 2 * (codes.tiles * codes.bits >> 2) + own
        chunk = (group * (count * lanes) + (first >> 2) * lanes + lane) * (vector // words) + (first & 3) // words
        place = (chunk * words)[:, None] + jnp.arange(words, dtype=jnp.int32)[None, :]
        loaded.append(tl.load(ref.at[place]))
    found = [tl.stack(list(steps)) for steps in zip(*map(tl.unstack, loaded), strict=True)]
    if eighths < 16:  # one of two words
        found = [jnp.where((own & 1)[:, None] == 1, found[1], found[0])]
    if eighths < 8:  # half of it
        found = [found[0] >> ((warp & 1) * 8)[:, None]]
    return found


def _stack(parts: list[jax.Array]) -> jax.Array:
    """Arrays [n] or [n, m] after each other in a last axis."""
    stacked = tl.stack(parts)
    return stacked if stacked.ndim == 2 else stacked.swapaxes(1, 2).reshape(stacked.shape[0], -1)


def _group(group: jax.Array, codes: Codes) -> jax.Array:
    return jnp.minimum(group, codes.rows // WORD - 1)


def _registers(words: list[jax.Array], codes: Codes) -> list[list[jax.Array]]:
    """Words that follow each other as an operand's registers, tile after tile.

    A tile's are rows g and g + 8 at the first inner places, then at the last.
    """
    mask = (2**codes.bits - 1) * 0x00010001
    pairs = [half & np.int32(mask << place) for x in words for half in (x, x >> 8) for place in range(0, 8, codes.bits)]
    return [pairs[i : i + 4] for i in range(0, len(pairs), 4)]


def _operand(registers: jax.Array) -> jax.Array:
    """The [16 * steps, COLUMNS] operand of registers int32 [TOKENS, steps, 2].

    A thread's are those of `tile.TileReader`'s operands in the order "columns", so no data moves: see `place_of`. Words
    are masked and halved many at a time: compiling takes a time that grows with the square of the number of operations
    (`fusion`).
    """
    stacked = jnp.stack(tl.as_dtype_pairs(registers, DTYPE), axis=-1)
    stacked = stacked.reshape(COLUMNS, 4, -1, 2, 2)  # column, place; step, i, half
    return stacked.transpose(2, 1, 3, 4, 0).reshape(-1, COLUMNS)


def times_keys(query: jax.Array, words: list[jax.Array], codes: Codes) -> list[jax.Array]:
    """Products of queries [ROWS, H] with a tile of keys, float32 [ROWS, COLUMNS] for the tokens of `ORDER`."""
    found = []
    for x in words:
        tiles = _registers(tl.unstack(x.reshape(TOKENS, -1, 2)) if codes.bits == 8 else [x], codes)
        # tiles that share a word follow each other
        registers = [_stack_last([tile[i] for tile in tiles]) for i in range(4)]
        found += [tl.dot(query, _operand(jnp.stack(registers[half::2], axis=-1))) for half in range(2)]
    return found


def times_table(
    query: jax.Array, ref: tl.Ref, index: jax.Array, rotations: Rotations, unit: jax.Array
) -> list[jax.Array]:
    """`TileReader.times_table` of queries whose rows count for `unit`, float32 [ROWS]."""
    chunks, products = query.shape[1] // WORD, len(ORDER.products) // rotations.count
    thread = jnp.arange(TOKENS, dtype=jnp.int32)
    place = 4 * (index * (products * chunks * TOKENS) + thread)[:, None] + jnp.arange(4, dtype=jnp.int32)[None, :]
    scores = []
    for product in range(products):
        first = 4 * TOKENS * chunks * product
        words = [tl.load(ref.at[place + (first + 4 * TOKENS * i)], eviction_policy="evict_last") for i in range(chunks)]
        table = _operand(_stack(words).reshape(TOKENS, -1, 2))
        scores.append(rotations.of_rows(tl.dot(query, table) * unit[:, None]))
    return [rotated[i] for i in range(rotations.count) for rotated in scores]


def _stack_last(parts: list[jax.Array]) -> jax.Array:
    """Arrays [n, m], entry by entry, [n, m * parts]."""
    return tl.stack(parts).reshape(parts[0].shape[0], -1)


def times_values(weights: jax.Array, words: list[jax.Array], codes: Codes) -> list[jax.Array]:
    """Products of weights [ROWS, TOKENS] with a tile of values, float32 [ROWS, COLUMNS] for `channels`."""
    tiles = _registers(words, codes)[: codes.products // 2]
    return [
        tl.dot(weights, _operand(jnp.stack(tile[half::2], axis=-1))) * np.float32(codes.units[half])
        for tile in tiles
        for half in range(2)
    ]


def channels(product: int, column: jax.Array, codes: Codes) -> jax.Array:
    """The channels that the columns of a product of values stand for."""
    tile = codes.tiles // _WARPS * (column >> 3) + product // 2
    return TILE * tile + product % 2 * 8 + (column & 7)


def heads(x: jax.Array, rows: int) -> jax.Array:
    """The first 8 or 16 rows of [ROWS, n]."""
    return pick(x.reshape(ROWS // rows, rows, x.shape[1]), 0)


def join(parts: list[jax.Array]) -> jax.Array:
    """The products' columns [8 or ROWS, COLUMNS], as `place_of` has their tokens; rows of [ROWS, TOKENS] may repeat."""
    rows = parts[0].shape[0]
    stacked = jnp.stack([jnp.stack(parts[0::2], axis=-1), jnp.stack(parts[1::2], axis=-1)], axis=-1)
    stacked = stacked.reshape(rows, COLUMNS // 8, 4, 2, 2, 2)  # [.., j, h, product // 2, product % 2]
    joined = stacked.transpose(0, 1, 4, 2, 5, 3).reshape(rows, TOKENS)
    return jnp.broadcast_to(joined[None], (ROWS // rows, rows, TOKENS)).reshape(ROWS, TOKENS)


def load_scales(ref: tl.Ref, index: jax.Array, codes: Codes) -> list[jax.Array]:
    """The scales of a tile's rows, float32 [COLUMNS] for each of `ORDER`'s products.

    Args:
        ref: int32 [S / 2], two scales to a word.
        index, codes: as in `load_keys`.
    """
    column = jnp.arange(COLUMNS, dtype=jnp.int32)
    place = _group(index * _GROUPS + (column >> 3), codes) * (WORD // 2) + 2 * (column & 7)
    words = [tl.load(ref.at[place + i]) for i in range(2)]
    return [half for word in words for half in tl.float32_pair(word, jnp.bfloat16, interpret=False)]


def scale_logs(scales: jax.Array) -> jax.Array:
    """What goes on the scores of values' rows before their maximum is taken; at most 1 too large."""
    exponent = jax.lax.bitcast_convert_type(scales, jnp.int32) >> _MANTISSA
    return (jnp.maximum(exponent - (_BIAS - 1), _LEAST) - _ROOM).astype(jnp.float32)


def into_range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [ROWS, n] times a power of two that puts the largest entry from 2 ** 14 to 2 ** 15; and its inverse [ROWS].

    Nothing overflows float16 then, and what is lost below its normal numbers is 2 ** -39 of the largest entry.
    """
    largest = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=1), jnp.int32)
    exponent = jnp.maximum(largest >> _MANTISSA, _LARGEST + 1)
    powers = [2 * _BIAS + _LARGEST - exponent, exponent - _LARGEST]
    down, up = (jax.lax.bitcast_convert_type(power << _MANTISSA, jnp.float32) for power in powers)
    return x * down[:, None], up
