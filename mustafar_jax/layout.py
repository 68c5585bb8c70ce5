"""The layout of stored tokens: sizes, orders, words, places. XLA and the kernels both build on it.

Tokens are stored 32 together. docs/architecture.md draws the layout.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

WORD = 32
"""Channels of a bitmap word, and tokens that are stored together."""


def padded(length: int) -> int:
    """A number of tokens, rounded up to whole groups of 32."""
    return length + -length % WORD


def round_slots(slots: int, bits: int | None = None) -> int:
    """The slots of a row: a multiple of 4, at least 4; where they hold codes of so many bits, they fill whole words."""
    unit = 4 if bits is None else max(4, WORD // bits)
    return unit * math.ceil(max(slots, 1) / unit)


@dataclasses.dataclass(frozen=True)
class Dealt:
    """Rows of tokens that are dealt round to devices: group g of `unit` rows is group g // count of device g % count.

    So every device has as many, but for one group, whatever the length of a sequence.

    Attributes:
        unit: rows of a group, a multiple of 32.
        count: devices; with one, everything stays in its place.
        index: int32, this device's number.
    """

    unit: int
    count: int = 1
    index: Any = 0

    def share(self, rows: int) -> int:
        """The most that a device has of so many rows, in whole groups; static."""
        return rows if self.count == 1 else -(-rows // (self.unit * self.count)) * self.unit

    def held(self, rows: jax.Array) -> jax.Array:
        """How many of the first `rows` are this device's."""
        if self.count == 1:
            return rows
        groups, rest = rows // self.unit, rows % self.unit
        whole = (groups - self.index + self.count - 1) // self.count * self.unit
        return whole + jnp.where(groups % self.count == self.index, rest, 0)

    def row(self, place: Any) -> Any:
        """Which row stands at a place of this device."""
        if self.count == 1:
            return place
        return (place // self.unit * self.count + self.index) * self.unit + place % self.unit


def chunk(slots: int) -> int:
    """Slots of a row that stand together: 8, or 4 where `slots` is no multiple of 8."""
    return 8 if slots % 8 == 0 else 4


def interleave(rows: jax.Array, size: int) -> jax.Array:
    """[..., S, n] -> [..., S / 32, n / size, 32, size]: 32 lanes that read a chunk of `size` each read one block."""
    *leading, length, count = rows.shape
    return rows.reshape(*leading, length // WORD, WORD, count // size, size).swapaxes(-3, -2)


def deinterleave(payload: jax.Array) -> jax.Array:
    """The inverse of `interleave`."""
    *leading, groups, chunks, _, size = payload.shape
    return payload.swapaxes(-3, -2).reshape(*leading, groups * WORD, chunks * size)


def to_bit_words(codes: jax.Array, bits: int) -> jax.Array:
    """Codes uint8 [..., n], below 2**bits, as words uint32 [..., n * bits / 32], the first one in the lowest bits."""
    words = codes.reshape(*codes.shape[:-1], codes.shape[-1] * bits // WORD, WORD // bits).astype(jnp.uint32)
    return jnp.sum(words << _places(words.ndim, bits), axis=-1, dtype=jnp.uint32)


def from_bit_words(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `to_bit_words`."""
    codes = words[..., None] >> _places(words.ndim + 1, bits) & (1 << bits) - 1
    return codes.astype(jnp.uint8).reshape(*words.shape[:-1], words.shape[-1] * WORD // bits)


def to_words(mask: jax.Array) -> jax.Array:
    """Bool [..., H] -> uint32 [..., H / 32]: channel c is bit c % 32 of word c // 32."""
    return to_bit_words(mask.astype(jnp.uint8), 1)


def to_mask(words: jax.Array) -> jax.Array:
    """The inverse of `to_words`."""
    return from_bit_words(words, 1).astype(bool)


def _places(rank: int, bits: int) -> jax.Array:
    """uint32 [1, ..., 32 / bits]: where the codes of a word begin."""
    return lax.broadcast_to_rank(jnp.arange(0, WORD, bits, dtype=jnp.uint32), rank)


def first_held(mask: jax.Array, slots: int) -> jax.Array:
    """Bool [..., H]: of the masked entries of each row, those that find one of its slots, by ascending channels."""
    return mask & (_rank(mask) < slots)


def compress(entries: jax.Array, held: jax.Array, slots: int) -> jax.Array:
    """Move the held entries of each row into its first slots, in the order of their channels.

    Args:
        entries: [..., H], moved as they are.
        held: bool [..., H], at most `slots` of each row.
        slots: of a row.

    Returns:
        [..., slots], zero where no entry stands.
    """
    head_dim = entries.shape[-1]
    # Entries that are not held go to places beyond the slots, a different one each, where the scatter drops them.
    slot = jnp.where(held, _rank(held), lax.broadcast_to_rank(slots + jnp.arange(head_dim), held.ndim))

    def place(entries: jax.Array, slot: jax.Array) -> jax.Array:
        return jnp.zeros(slots, entries.dtype).at[slot].set(entries, mode="drop", unique_indices=True)

    # Each leading axis stays one of the scatter's own: of axes that are flattened, a mesh's devices would gather all.
    for _ in range(entries.ndim - 1):
        place = jax.vmap(place)
    return place(entries, slot)


def _rank(mask: jax.Array) -> jax.Array:
    """int32 [..., H]: how many of a row's masked entries stand before each."""
    return jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1


def expand(slots: jax.Array, words: jax.Array) -> jax.Array:
    """The inverse of `compress`: [..., slots] and bitmap words [..., H / 32] -> [..., H], zero where none is held."""
    below = words[..., None] & ((jnp.uint32(1) << _places(words.ndim + 1, 1)) - 1)
    counts = lax.population_count(words).astype(jnp.int32)
    before = jnp.cumsum(counts, axis=-1) - counts
    rank = before[..., None] + lax.population_count(below).astype(jnp.int32)
    rank = rank.reshape(*words.shape[:-1], words.shape[-1] * WORD)
    # clip: a bitmap that nobody has written may ask for slots that are not there
    entries = jnp.take_along_axis(slots, rank, axis=-1, mode="clip")
    return jnp.where(to_mask(words), entries, 0)


def to_bits(x: jax.Array) -> jax.Array:
    """Entries as integers: moved so, every NaN stays as it is, also where XLA has no 16-bit floating point."""
    return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


Pairs = Literal["channels", "tokens"]
"""What stands in the two halves of a word of codes: neighbouring channels (keys), or neighbouring tokens (values)."""

TILE = 16
"""Tokens, and channels, that one product of a warp (mma.m16n8k16) takes."""


def planes(bits: int) -> tuple[int, ...]:
    """The widths in which codes of so many bits stand: each divides a half word; the lowest bits come first."""
    return (2, 1) if bits == 3 else (bits,)


def coded_words(head_dim: int, bits: int) -> tuple[int, ...]:
    """The words of each plane that a lane has of 32 tokens."""
    return tuple(head_dim * width // WORD for width in planes(bits))


def _vector(words: tuple[int, ...]) -> int:
    """Words that a lane reads at once: as many as divide all of these, at most 4."""
    return math.gcd(4, *words)


def coded_shape(length: int, head_dim: int, bits: int) -> tuple[int, int, int, int]:
    """The shape of `length` rows of codes of all their entries; `length` is a multiple of 32."""
    words = coded_words(head_dim, bits)
    return length // WORD, sum(words) // _vector(words), WORD, _vector(words)


def to_operands(codes: jax.Array, bits: int, pairs: Pairs) -> jax.Array:
    """Codes of whole rows as words that a warp multiplies as they are.

    A group of 32 tokens has H / 8 tiles of 16 tokens by 16 channels, the first 16 tokens' first, by ascending channels.
    A lane of 32 holds 8 codes of each tile, as mma.m16n8k16 wants its first operand from it: with g = lane // 4 and t =
    lane % 4, rows g and g + 8, and of the inner axis 2t, 2t + 1, 2t + 8 and 2t + 9. Channels are the inner axis of keys
    (`pairs` "channels"), tokens that of values.

    The 8 codes are four pairs, whose inner places are neighbours: rows g, g + 8 at 2t, then at 2t + 8. The first of a
    pair stands in the low half of a word, the second at the same bits of the high half. Pairs fill words from the
    lowest bits on, tile after tile: a word is one tile of 4 bits, half a tile of 8, or two tiles of 2. Codes of 3 bits
    are a plane of their two low bits, then one of their high bits.

    Args:
        codes: uint8 [..., S, H], below 2**bits; S and H are multiples of 32.
        bits: 8, 4, 3, 2 or 1.
        pairs: see above.

    Returns:
        uint32 [..., S / 32, words / v, 32, v]: v words of each lane stand together, at most 4.
    """
    words, shift = [], 0
    for width in planes(bits):
        words.append(_plane(codes >> shift & (1 << width) - 1, width, pairs))
        shift += width
    joined = jnp.concatenate(words, axis=-2)  # [..., S / 32, words, 32]
    *leading, count, lanes = joined.shape
    vector = _vector(coded_words(codes.shape[-1], bits))
    return joined.reshape(*leading, count // vector, vector, lanes).swapaxes(-2, -1)


def from_operands(payload: jax.Array, bits: int, pairs: Pairs) -> jax.Array:
    """The inverse of `to_operands`: uint8 [..., S, H]."""
    *leading, vectors, lanes, vector = payload.shape
    joined = payload.swapaxes(-2, -1).reshape(*leading, vectors * vector, lanes)
    head_dim = vectors * vector * WORD // bits
    codes, shift, first = jnp.zeros((), jnp.uint8), 0, 0
    for width, count in zip(planes(bits), coded_words(head_dim, bits), strict=True):
        plane = _codes(joined[..., first : first + count, :], width, pairs)
        codes, shift, first = codes | plane << shift, shift + width, first + count
    return codes


def _plane(codes: jax.Array, width: int, pairs: Pairs) -> jax.Array:
    """Codes below 2**width as the words [..., S / 32, words, 32] of `to_operands`."""
    *leading, length, head_dim = codes.shape
    groups = codes.reshape(*leading, length // WORD, WORD, head_dim).astype(jnp.uint32)
    return tile_words(groups, width, pairs)


def tile_words(codes: jax.Array, width: int, pairs: Pairs) -> jax.Array:
    """Codes below 2**width, 32-bit integers, as their words in `to_operands`.

    Args:
        codes: [..., T, H] of 16 tokens, or of 32, where a word may be of two tiles of tokens.
        width: see above; T * H * width is a multiple of 1,024.
        pairs: as in `to_operands`.

    Returns:
        [..., T * H * width / 1024, 32].
    """
    *leading, tokens, head_dim = codes.shape
    tiles = () if tokens == TILE else (tokens // TILE,)  # a kernel wants no more axes than it needs
    first, per_half = len(leading) + len(tiles), WORD // 2 // width
    order = (*range(first), *(first + axis for axis in _ORDER[pairs]))
    halves = codes.reshape(*leading, *tiles, *_split(head_dim, pairs)).transpose(order)
    words = tokens * head_dim * width // WORD**2
    by_word = halves.reshape(*leading, words, per_half, WORD, 2).swapaxes(-3, -2)
    in_words = by_word.reshape(*by_word.shape[:-2], WORD // width)
    return jnp.sum(in_words << _pair_places(in_words.ndim, width, codes.dtype), axis=-1, dtype=codes.dtype)


def _pair_places(rank: int, width: int, dtype: DTypeLike) -> jax.Array:
    """[1, ..., 32 / width]: where a word's codes begin, those of a pair after each other; made within a kernel, too."""
    index = lax.broadcasted_iota(dtype, (1,) * (rank - 1) + (WORD // width,), rank - 1)
    return width * (index >> 1) + WORD // 2 * (index & 1)


def _codes(words: jax.Array, width: int, pairs: Pairs) -> jax.Array:
    """The inverse of `_plane`."""
    *leading, groups, count, _ = words.shape
    in_words = words[..., None] >> _pair_places(words.ndim + 1, width, words.dtype) & (1 << width) - 1
    by_word = in_words.astype(jnp.uint8).reshape(*words.shape, WORD // 2 // width, 2)
    halves = by_word.swapaxes(-3, -2)  # [..., words, pairs of a word, 32, 2]
    head_dim = count * WORD // width
    sizes = [_split(head_dim, pairs)[axis] for axis in _ORDER[pairs]]
    first = len(leading) + 2
    back = (*range(first), *(first + int(axis) for axis in np.argsort(_ORDER[pairs])))
    tiles = halves.reshape(*leading, groups, WORD // TILE, *sizes).transpose(back)
    return tiles.reshape(*leading, groups * WORD, head_dim)


_ORDER: dict[Pairs, tuple[int, ...]] = {"channels": (2, 3, 0, 1, 4, 5), "tokens": (3, 0, 4, 5, 1, 2)}
"""From the axes of `_split` to: tiles of channels; halves of the inner axis, of rows; g; t; the pair."""


def _split(head_dim: int, pairs: Pairs) -> tuple[int, ...]:
    """The axes of 16 tokens, then of their channels: tiles, and a tile's 16 rows (2, 8) or places (2, 4, 2)."""
    rows, inner = (2, 8), (2, 4, 2)
    tokens, channels = (rows, inner) if pairs == "channels" else (inner, rows)
    return *tokens, head_dim // TILE, *channels


def to_lanes(scales: jax.Array) -> jax.Array:
    """[..., S], in groups of 32 tokens: token 8 i + g goes to place 4 g + i, so that a lane reads its four at once."""
    *leading, length = scales.shape
    return scales.reshape(*leading, length // WORD, 4, 8).swapaxes(-2, -1).reshape(scales.shape)


def from_lanes(scales: jax.Array) -> jax.Array:
    """The inverse of `to_lanes`."""
    *leading, length = scales.shape
    return scales.reshape(*leading, length // WORD, 8, 4).swapaxes(-2, -1).reshape(scales.shape)


def slot_of_position(position: jax.Array, sinks: int, ring: int) -> jax.Array:
    """The dense slot that a token at this position has, or had: first the sinks, then a ring of recent tokens."""
    return jnp.where(position < sinks, position, sinks + (position - sinks) % ring)


def position_of_slot(slot: jax.Array, packed: jax.Array, sinks: int, ring: int) -> jax.Array:
    """The position of the token in a dense slot, int32, of a sequence that has `packed` tokens packed.

    The ring's oldest token is at position sinks + packed, in its slot packed % ring. A position at the sequence's
    length or beyond means that no token is there.
    """
    # All of 32 bits, a Python number too: `rem` takes one kind alone, also where integers have 64.
    slot, packed, size = slot.astype(jnp.int32), packed.astype(jnp.int32), np.int32(ring)
    age = lax.rem(slot - sinks - lax.rem(packed, size) + ring, size)
    return jnp.where(slot < sinks, slot, sinks + packed + age)
