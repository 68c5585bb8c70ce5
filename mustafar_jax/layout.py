"""The layout of stored tokens: sizes, orders, words, places. XLA and the kernels both build on it.

Tokens are stored 32 together. docs/architecture.md draws the layout.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = 32
"""Channels of a bitmap word, and tokens that are stored together."""


def padded(length: int) -> int:
    """A number of tokens, rounded up to whole groups of 32."""
    return length + -length % WORD


def round_slots(slots: int) -> int:
    """The slots of a row: a multiple of 4, at least 4."""
    return 4 * math.ceil(max(slots, 1) / 4)


def chunk(slots: int) -> int:
    """Slots of a row that stand together: 8, or 4 where `slots` is no multiple of 8."""
    return 8 if slots % 8 == 0 else 4


def interleaved_shape(length: int, slots: int) -> tuple[int, int, int, int]:
    """The shape of `length` rows of slots, interleaved; `length` is a multiple of 32."""
    return length // WORD, slots // chunk(slots), WORD, chunk(slots)


def interleave(rows: jax.Array) -> jax.Array:
    """[..., S, slots] -> [..., S / 32, slots / chunk, 32, chunk]: 32 lanes that read a chunk each read one block."""
    *leading, length, slots = rows.shape
    size = chunk(slots)
    return rows.reshape(*leading, length // WORD, WORD, slots // size, size).swapaxes(-3, -2)


def deinterleave(payload: jax.Array) -> jax.Array:
    """The inverse of `interleave`."""
    *leading, groups, chunks, _, size = payload.shape
    return payload.swapaxes(-3, -2).reshape(*leading, groups * WORD, chunks * size)


def to_words(mask: jax.Array) -> jax.Array:
    """Bool [..., H] -> uint32 [..., H / 32]: channel c is bit c % 32 of word c // 32."""
    bits = mask.reshape(*mask.shape[:-1], mask.shape[-1] // WORD, WORD).astype(jnp.uint32)
    return jnp.sum(bits << _channels(bits.ndim), axis=-1, dtype=jnp.uint32)


def to_mask(words: jax.Array) -> jax.Array:
    """The inverse of `to_words`."""
    bits = words[..., None] >> _channels(words.ndim + 1) & 1
    return bits.astype(bool).reshape(*words.shape[:-1], words.shape[-1] * WORD)


def _channels(rank: int) -> jax.Array:
    """uint32 [1, ..., 32]: the channels of a word."""
    return lax.broadcast_to_rank(jnp.arange(WORD, dtype=jnp.uint32), rank)


def compress(entries: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Move the masked entries of each row into its first slots, in the order of their channels.

    Args:
        entries: [..., H], moved as they are.
        mask: bool [..., H].
        slots: of a row.

    Returns:
        [..., slots], zero where no entry stands; and bool [..., H], the entries that found a slot.
    """
    rank = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    held = mask & (rank < slots)
    *leading, head_dim = entries.shape
    # Entries that are not held go to places beyond the slots, a different one each, where the scatter drops them.
    slot = jnp.where(held, rank, slots + jnp.arange(head_dim)).reshape(-1, head_dim)
    row = jnp.arange(slot.shape[0])[:, None]
    rows = jnp.zeros((slot.shape[0], slots), entries.dtype)
    rows = rows.at[row, slot].set(entries.reshape(-1, head_dim), mode="drop", unique_indices=True)
    return rows.reshape(*leading, slots), held


def expand(slots: jax.Array, words: jax.Array) -> jax.Array:
    """The inverse of `compress`: [..., slots] and bitmap words [..., H / 32] -> [..., H], zero where none is held."""
    below = words[..., None] & ((jnp.uint32(1) << _channels(words.ndim + 1)) - 1)
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
