"""Rows of stored tokens: which entries of each vector are held, and how they are coded.

The bitmap and the packed nonzeros keep a pruned cache small (arXiv 2505.22913, section 4). The layout differs from the
published one, which `mustafar_jax.interop` exports: keys and values alike have one row per token, and every row has the
same number of slots. So nothing needs offsets, and a group of tokens is appended by a write at a known place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax import layout
from mustafar_jax.codecs import BY_BITS, PLAIN, Codec, check_bits
from mustafar_jax.layout import WORD
from mustafar_jax.writes import write_rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bitmap", "payload", "scale", "overflow"],
    meta_fields=["codec", "head_dim", "dtype", "length"],
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Rows:
    """Stored vectors [..., S, H], a row per token. A pytree.

    S' is S rounded up to a multiple of 32. Invariants of rows with a bitmap, for every row:
        - bit c % 32 of word c // 32 is set exactly where channel c is held;
        - the held entries stand in the row's slots in channel order; the free slots behind them hold the code 0;
        - no row holds more than `slots` entries: where a traced mask asked for more, the first `slots` are held and
          `overflow` is set for that leading index;
        - rows from `length` on hold nothing.

    Attributes:
        bitmap: uint32 [..., S', H / 32]; None where every entry is held.
        payload: the codes. With a bitmap [..., S' / 32, slots / chunk, 32, chunk]: 32 tokens interleaved in chunks of 8
            slots (4 where slots is no multiple of 8), so that 32 lanes reading a chunk each, of neighbouring tokens,
            read one block. Without one [..., S', H].
        scale: [..., S']; None where the codec has none.
        overflow: bool [...], whether any row under this leading index did not fit; None without a bitmap.
        codec: how an entry is coded; static, as all that follow are.
        head_dim: H.
        dtype: of the entries that `to_array` gives.
        length: S, the rows that there are to its user.
    """

    bitmap: jax.Array | None
    payload: jax.Array
    scale: jax.Array | None
    overflow: jax.Array | None
    codec: Codec
    head_dim: int
    dtype: np.dtype[Any]
    length: int

    def __repr__(self) -> str:
        """One line: what they are, not what they hold."""
        held = "every entry" if self.bitmap is None else f"{self.slots} slots"
        return f"Rows({np.dtype(self.dtype).name}{list(self.shape)}, {held}, {self.codec.name})"

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes before those of the rows and their entries."""
        return self.payload.shape[: -2 if self.bitmap is None else -4]

    @property
    def padded_length(self) -> int:
        """S'."""
        return layout.padded(self.length)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., S, H], of the array that this stands for."""
        return (*self.leading, self.length, self.head_dim)

    @property
    def ndim(self) -> int:
        """Axes of `shape`."""
        return len(self.leading) + 2

    @property
    def slots(self) -> int:
        """Entries that a row has room for: those of a bitmap, or all."""
        return self.head_dim if self.bitmap is None else self.payload.shape[-3] * self.payload.shape[-1]

    @property
    def is_plain(self) -> bool:
        """Whether entries are numbers of the vectors' dtype."""
        return self.codec == PLAIN

    @property
    def nbytes(self) -> int:
        """Bytes held: bitmap, payload, scales and overflow flags."""
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))
        return self.codec.nbytes(held, math.prod(self.leading) * self.padded_length * self.slots)

    def to_array(self) -> jax.Array:
        """The array [..., S, H]: every held entry in its channel, zero elsewhere."""
        words = self.bitmap
        if words is None:
            return _by_bits(self._rows_there_are, self.codec.decode(self.payload, self.scale))
        entries = self.codec.decode(_by_bits(layout.deinterleave, self.payload), self.scale)
        return _by_bits(lambda slots: self._rows_there_are(layout.expand(slots, words)), entries)

    def _rows_there_are(self, x: jax.Array) -> jax.Array:
        return x[..., : self.length, :]

    def mask(self) -> jax.Array:
        """Bool [..., S, H]: where an entry is held."""
        if self.bitmap is None:
            return jnp.ones(self.shape, bool)
        return layout.to_mask(self.bitmap)[..., : self.length, :]

    def take(self, start: jax.Array, length: int) -> "Rows":
        """Rows start .. start + length - 1, both multiples of 32; start may be traced."""

        def cut(x: jax.Array, unit: int) -> jax.Array:
            axis = len(self.leading)
            return lax.dynamic_slice_in_dim(x, start // unit, length // unit, axis=axis)

        taken: dict[str, Any] = {name: cut(getattr(self, name), unit) for name, unit in self._units().items()}
        return dataclasses.replace(self, **taken, length=length)

    def put(self, update: "Rows", start: jax.Array) -> "Rows":
        """Overwrite whole groups of rows, which must be [B, K, S, H], at another place in each sequence.

        Args:
            update: [B, K, n, H] of the same format, n a multiple of 32.
            start: int32 [B], multiples of 32; a sequence whose start is S or more is left as it is.
        """
        written: dict[str, Any] = {
            name: write_rows(getattr(self, name), getattr(update, name), start // unit, axis=2)
            for name, unit in self._units().items()
        }
        overflow = self.overflow
        if overflow is not None:
            assert update.overflow is not None
            overflow = overflow | (update.overflow & (start < self.length)[:, None])
        return dataclasses.replace(self, **written, overflow=overflow)

    def without_overflow(self) -> "Rows":
        """The same rows, with no flag set."""
        cleared = None if self.overflow is None else jnp.zeros_like(self.overflow)
        return dataclasses.replace(self, overflow=cleared)

    def _units(self) -> dict[str, int]:
        """The arrays that rows stand in, and how many of them one index of their first axis is."""
        units = {"bitmap": 1, "payload": 1 if self.bitmap is None else WORD, "scale": 1}
        return {name: unit for name, unit in units.items() if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How vectors are stored as rows. Hashable: static under `jax.jit`.

    Attributes:
        head_dim: H; a multiple of 32 where there are slots.
        dtype: of the vectors: bfloat16, float16 or float32.
        slots: entries that each row has room for, named by a bitmap; None where every entry is held.
        codec: how an entry is coded.
    """

    head_dim: int
    dtype: np.dtype[Any]
    slots: int | None = None
    codec: Codec = PLAIN

    def pack(self, x: jax.Array, mask: jax.Array | None = None) -> Rows:
        """Store vectors.

        Args:
            x: [..., S, H], of the format's dtype, or float32 where it has not been rounded to that yet.
            mask: bool of x's shape, True where an entry is held; None where every entry is.
        """
        length = x.shape[-2]
        padding = [(0, 0)] * (x.ndim - 2) + [(0, layout.padded(length) - length), (0, 0)]
        pad = functools.partial(jnp.pad, pad_width=padding)
        if self.slots is None:
            codes, scale = self.codec.encode(_by_bits(pad, x), self.dtype)
            return self._rows(None, codes, scale, None, length)
        assert mask is not None
        mask = pad(mask)
        entries, held = layout.compress(pad(layout.to_bits(x)), mask, layout.round_slots(self.slots))
        codes, scale = self.codec.encode(lax.bitcast_convert_type(entries, x.dtype), self.dtype)
        overflow = jnp.any(mask & ~held, axis=(-2, -1))
        payload = _by_bits(layout.interleave, codes)
        return self._rows(layout.to_words(held), payload, scale, overflow, length)

    def empty(self, leading: tuple[int, ...], length: int) -> Rows:
        """Rows [*leading, length, H] that hold nothing, or zeros."""
        rows = layout.padded(length)
        shape = (rows, self.head_dim if self.slots is None else layout.round_slots(self.slots))
        codes, scale = jax.eval_shape(lambda: self.codec.encode(jnp.zeros((*leading, *shape), self.dtype), self.dtype))
        scale = None if scale is None else jnp.zeros(scale.shape, scale.dtype)
        if self.slots is None:
            return self._rows(None, jnp.zeros(codes.shape, codes.dtype), scale, None, length)
        bitmap = jnp.zeros((*leading, rows, self.head_dim // WORD), jnp.uint32)
        payload = jnp.zeros((*leading, *layout.interleaved_shape(*shape)), codes.dtype)
        return self._rows(bitmap, payload, scale, jnp.zeros(leading, bool), length)

    def _rows(
        self,
        bitmap: jax.Array | None,
        payload: jax.Array,
        scale: jax.Array | None,
        overflow: jax.Array | None,
        length: int,
    ) -> Rows:
        dtype = self.codec.result_dtype(self.dtype)
        return Rows(bitmap, payload, scale, overflow, self.codec, self.head_dim, dtype, length)


def _by_bits(move: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Move entries as integers: see `layout.to_bits`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return move(x)
    return lax.bitcast_convert_type(move(layout.to_bits(x)), x.dtype)


def pack(x: jax.Array, mask: jax.Array | np.ndarray | None = None, *, slots: int | None = None, bits: int = 16) -> Rows:
    """Store the vectors [..., S, H], or the masked entries of them.

    Args:
        x: [..., S, H]; bfloat16, float16 or float32. H is a multiple of 32 where there is a mask.
        mask: bool of x's shape, True where an entry is held. Any mask: rows may be empty, full, or unequal. None holds
            every entry, without a bitmap.
        slots: entries that each row has room for, rounded up to a multiple of 4; the longest row's count if None.
        bits: 16 stores entries as they are, whatever their dtype; 8 as codes with one scale a row.

    Returns:
        The rows. In 16 bits `unpack` gives back where(mask, x, 0) bit for bit; in fewer the entries that the codes
        stand for, float32. Entries are moved as bits, through which no gradient flows: it is zero.

    Raises:
        ValueError: shapes that differ, H not a multiple of 32, slots < 1 or without a mask, a concrete mask with a row
            of more than `slots` entries, a traced mask without `slots`, bits that there are no codes of. A traced row
            that does not fit sets `overflow` instead.
        TypeError: another dtype of x, a mask that is not bool.
    """
    check_bits("bits", bits)
    _check_pack(x, mask)
    room = _resolve_slots(mask, slots)
    mask = None if mask is None else jnp.asarray(mask)
    return RowFormat(x.shape[-1], np.dtype(x.dtype), room, BY_BITS[bits]).pack(x, mask)


def unpack(rows: Rows) -> jax.Array:
    """The array [..., S, H]: every held entry in its channel, zero elsewhere; TypeError for anything else."""
    if not isinstance(rows, Rows):
        raise TypeError(f"rows is of type {type(rows).__name__}; wanted Rows, as mustafar_jax.pack gives them")
    return rows.to_array()


def _check_pack(x: jax.Array, mask: jax.Array | np.ndarray | None) -> None:
    for name, array in (("x", x), ("mask", mask)):
        if array is not None and not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{name} is of type {type(array).__name__}; wanted an array")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"x has dtype {x.dtype}; wanted bfloat16, float16 or float32")
    if mask is None:
        if x.ndim < 2:
            raise ValueError(f"x has shape {x.shape}; wanted [..., S, H]")
        return
    if x.ndim < 2 or mask.shape != x.shape:
        raise ValueError(f"mask has shape {mask.shape}, x has {x.shape}; wanted the same, [..., S, H]")
    if x.shape[-1] % WORD or x.shape[-1] == 0:
        raise ValueError(f"x has head_dim {x.shape[-1]}; wanted a multiple of {WORD}")
    if mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype}; wanted bool")


def _resolve_slots(mask: jax.Array | np.ndarray | None, slots: int | None) -> int | None:
    """Slots per row, checked against the mask where that is concrete; None without a mask."""
    if slots is not None and slots < 1:
        raise ValueError(f"{slots=} must be at least 1")
    if mask is None:
        if slots is not None:
            raise ValueError(f"{slots=} wants a mask: without one, every entry is held")
        return None
    if isinstance(mask, jax.core.Tracer):
        if slots is None:
            raise ValueError("slots=None needs a concrete mask; under jit or vmap pass the rows' capacity")
        return layout.round_slots(slots)
    longest = int(np.asarray(mask).sum(axis=-1).max(initial=0))
    rounded = layout.round_slots(longest if slots is None else slots)
    if longest > rounded:
        raise ValueError(f"{slots=} is too few: a row of mask holds {longest} entries")
    return rounded
