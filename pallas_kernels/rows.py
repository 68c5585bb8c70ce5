"""Rows of tokens as the kernels take them, packed or dense, and how a tile of them is loaded."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.pallas_kernels import triton
from mustafar_jax.pallas_kernels.tile import Entries

WORD = 32
"""Channels per bitmap word, and tokens that one block of values interleaves."""


class Packed(NamedTuple):
    """Packed rows, as in `mustafar_jax.BitmapArray`.

    Attributes:
        bitmap: uint32 [B, K, S, H / 32], channel c in bit c % 32 of word c // 32; S a multiple of 32.
        values: [B, K, S / 32, slots / chunk, 32, chunk], chunk 8, or 4 where slots is not a multiple of 8.
    """

    bitmap: jax.Array
    values: jax.Array


class Mean(NamedTuple):
    """A mean key: packed rows hold the distance of each key from it, rotated to the key's position.

    Attributes:
        key: float32 [B, K, H], before rotation.
        inv_freq: float32 [H / 2], RoPE's frequencies, a numpy array where they are known; channel i pairs with
            i + H / 2.
        offset: the position of row 0.
    """

    key: jax.Array
    inv_freq: jax.Array | np.ndarray
    offset: int


class Tail(NamedTuple):
    """The tokens that are not packed: the first ones of each sequence, then a ring of the most recent ones.

    Attributes:
        key, value: [B, K, slots, H]; the token at position p stands in slot p where p < sinks, else in slot sinks +
            (p - sinks) % (slots - sinks).
        sinks: how many first tokens stay; static.
    """

    key: jax.Array
    value: jax.Array
    sinks: int

    def first_row(self, lengths: jax.Array, window: int | None) -> jax.Array:
        """The first packed row that a window of so many tokens shows, int32 [B]; row r is position sinks + r."""
        return jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window - self.sinks, 0)


Rows = Packed | jax.Array
"""Keys or values: packed, or dense [B, K, S, H]."""


def row_count(rows: Rows) -> int:
    """Rows per KV head, S."""
    return rows.bitmap.shape[2] if isinstance(rows, Packed) else rows.shape[2]


def check_dtype(rows: Rows, dtype: Any) -> None:
    """Raise NotImplementedError where rows are of another dtype than what they are multiplied with."""
    held = rows.values.dtype if isinstance(rows, Packed) else rows.dtype
    if held != dtype:
        raise NotImplementedError(f"the kernels take one dtype; got {dtype} and rows of {held}")


def check_rows(key: Rows, value: Rows, dtype: Any) -> None:
    """`check_dtype` of both; ValueError where they are not as many."""
    for rows in (key, value):
        check_dtype(rows, dtype)
    if row_count(key) != row_count(value):
        raise ValueError(f"there are {row_count(key)} rows of keys and {row_count(value)} of values; wanted as many")


def flat(rows: Rows) -> list[jax.Array]:
    """Arrays with one flat row per KV head, which keeps a kernel's addresses cheap.

    Packed: bitmap int32 [B * K, S * H / 32] and values int32 [B * K, S * slots / 2], two neighbouring slots to a word,
    the first in its low half: their bits are what is moved.
    """
    if not isinstance(rows, Packed):
        return [rows.reshape(rows.shape[0] * rows.shape[1], -1)]
    bitmap = lax.bitcast_convert_type(rows.bitmap, jnp.int32)
    pairs = rows.values.reshape(*rows.values.shape[:-1], rows.values.shape[-1] // 2, 2)
    values = lax.bitcast_convert_type(pairs, jnp.int32)
    return [x.reshape(x.shape[0] * x.shape[1], -1) for x in (bitmap, values)]


def per_head(array: jax.Array, *, axis: int = 1) -> pl.BlockSpec:
    """The block of one KV head, all of it; the grid's `axis` counts heads."""
    return pl.BlockSpec((None, *array.shape[1:]), lambda *ids: (ids[axis],) + (0,) * (array.ndim - 1))


_AHEAD = 1
"""Chunks of slots that are on their way while one is stored."""
_ONCE = "evict_first"
"""Attention reads packed rows once: they need not push out of the first-level cache what is read again."""


def load_tile(
    bitmap_ref: triton.Ref, values_ref: triton.Ref, tokens: jax.Array, seen: jax.Array, *, head_dim: int, rows: int
) -> Entries:
    """Begin to load a tile of packed rows, a row per thread.

    Args:
        bitmap_ref: int32 [S * H / 32].
        values_ref: int32 [S * slots / 2].
        tokens: int32 [n], the rows.
        seen: bool [n]; the words of rows that are not seen come as 0, whatever they hold.
        head_dim: H.
        rows: S.
    """
    row_words, slots = head_dim // WORD, values_ref.shape[0] // rows  # words of slots, two to a word
    chunk = 4 if slots % 4 == 0 else 2
    word = tokens[:, None] * row_words + jnp.arange(row_words)[None, :]
    mask = jnp.broadcast_to(seen[:, None], word.shape)
    words = triton.load(bitmap_ref.at[word], mask=mask, other=0, eviction_policy=_ONCE)
    # rows past the end are not seen; the last block is read in their place
    block = jnp.minimum(tokens // WORD, rows // WORD - 1) * (slots * WORD) + tokens % WORD * chunk
    place = block[:, None] + jnp.arange(chunk)[None, :]

    def load(i: Any) -> jax.Array:
        return triton.load(values_ref.at[place + i * (WORD * chunk)], eviction_policy=_ONCE)

    chunks = slots // chunk
    return Entries(triton.unstack(words), [load(min(i, chunks - 1)) for i in range(_AHEAD)], load, chunks)
