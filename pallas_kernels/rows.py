"""Rows of tokens as the kernels take them, packed or dense."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
