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
from mustafar_jax.codecs import PLAIN, Codec, codec_of
from mustafar_jax.layout import WORD, Pairs
from mustafar_jax.writes import write_rows


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How vectors are stored as rows. Hashable: static under `jax.jit`.

    Attributes:
        head_dim: H; a multiple of 32 where rows are pruned or coded.
        dtype: of the vectors: bfloat16, float16 or float32.
        slots: entries that each row must have room for, named by a bitmap; None where every entry is held.
        codec: how an entry is coded.
        pairs: the order of codes where every entry is held, as `layout.to_operands` has it: "channels" for keys,
            "tokens" for values.
    """

    head_dim: int
    dtype: np.dtype[Any]
    slots: int | None = None
    codec: Codec = PLAIN
    pairs: Pairs = "channels"

    @property
    def room(self) -> int:
        """Entries that each row has room for: `slots`, rounded up by `layout.round_slots`; or all."""
        return self.head_dim if self.slots is None else layout.round_slots(self.slots, self.codec.bits)

    @property
    def nbytes_of_group(self) -> int:
        """Bytes of 32 rows: bitmap, payload and scales."""
        rows: Rows = jax.eval_shape(functools.partial(self.empty, (), WORD))
        return rows.nbytes - (0 if rows.overflow is None else rows.overflow.dtype.itemsize)

    def pack(self, x: jax.Array, mask: jax.Array | None = None, weight: jax.Array | None = None) -> "Rows":
        """Store vectors.

        Args:
            x: [..., S, H], of the format's dtype, or float32 where it has not been rounded to that yet.
            mask: bool of x's shape, True where an entry is held; None where every entry is.
            weight: float32, broadcasts against x: see `Codec.encode`.
        """
        length = x.shape[-2]
        pad = functools.partial(_pad_tokens, count=layout.padded(length) - length)
        x = _by_bits(pad, x)
        if self.slots is None:
            codes, scale = self.codec.encode(x, self.dtype, None, weight)
            return self._rows(None, codes, scale, None, length)
        assert mask is not None
        mask = pad(mask)
        held = layout.first_held(mask, self.room)
        codes, scale = self.codec.encode(x, self.dtype, held, weight)
        codes = _by_bits(lambda codes: layout.compress(codes, held, self.room), codes)
        return self._rows(layout.to_words(held), codes, scale, jnp.any(mask & ~held, axis=(-2, -1)), length)

    def empty(self, leading: tuple[int, ...], length: int) -> "Rows":
        """Rows [*leading, length, H] that hold nothing, or what codes of 0 stand for."""
        like = jax.ShapeDtypeStruct((*leading, length, self.head_dim), self.dtype)
        mask = None if self.slots is None else jax.ShapeDtypeStruct(like.shape, bool)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self.pack, like, mask))

    def _rows(
        self,
        bitmap: jax.Array | None,
        codes: jax.Array,
        scale: jax.Array | None,
        overflow: jax.Array | None,
        length: int,
    ) -> "Rows":
        scale = None if scale is None else _by_bits(layout.to_lanes, scale)
        return Rows(bitmap, _by_bits(self._arrange, codes), scale, overflow, self, length)

    def _arrange(self, codes: jax.Array) -> jax.Array:
        """The payload of codes [..., S', room]; the numbers of plain rows as integers."""
        bits = self.codec.bits
        if self.slots is None:
            return codes if bits is None else layout.to_operands(codes, bits, self.pairs)
        if bits is None:
            return layout.interleave(codes, layout.chunk(self.room))
        words = layout.to_bit_words(codes, bits)
        return layout.interleave(words, math.gcd(4, words.shape[-1]))

    def _rearrange(self, payload: jax.Array) -> jax.Array:
        """The inverse of `_arrange`."""
        bits = self.codec.bits
        if self.slots is None:
            return payload if bits is None else layout.from_operands(payload, bits, self.pairs)
        entries = layout.deinterleave(payload)
        return entries if bits is None else layout.from_bit_words(entries, bits)

    def decode(self, payload: jax.Array, scale: jax.Array | None) -> jax.Array:
        """The entries [..., S', room] of a payload."""
        scale = None if scale is None else _by_bits(layout.from_lanes, scale)
        return self.codec.decode(_by_bits(self._rearrange, payload), scale)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bitmap", "payload", "scale", "overflow"],
    meta_fields=["format", "length"],
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Rows:
    """Stored vectors [..., S, H], a row per token. A pytree.

    S' is S rounded up to a multiple of 32. Invariants of rows with a bitmap, for every row:
        - bit c % 32 of word c // 32 is set exactly where channel c is held;
        - the held entries stand in the row's slots in channel order; the free slots behind them hold the code 0;
        - no row holds more entries than it has slots: where a traced mask asked for more, the first are held and
          `overflow` is set for that leading index;
        - rows from `length` on hold nothing.

    Attributes:
        bitmap: uint32 [..., S', H / 32]; None where every entry is held.
        payload: the codes, 32 tokens together.
            Plain numbers of every entry: [..., S', H].
            Plain numbers behind a bitmap: [..., S' / 32, slots / chunk, 32, chunk], interleaved in chunks of 8 slots (4
            where slots is no multiple of 8), so that 32 lanes reading a chunk each, of neighbouring tokens, read one
            block.
            Codes of every entry: uint32 [..., S' / 32, words / v, 32, v], as `layout.to_operands` gives them.
            Codes behind a bitmap: uint32 [..., S' / 32, words / v, 32, v], the slots' codes from the lowest bits on.
        scale: bfloat16 [..., S'], in the order of `layout.to_lanes`; None where the codec has none.
        overflow: bool [...], whether any row under this leading index did not fit; None without a bitmap.
        format: what the rows are; static, as what follows is.
        length: S, the rows that there are to its user.
    """

    bitmap: jax.Array | None
    payload: jax.Array
    scale: jax.Array | None
    overflow: jax.Array | None
    format: RowFormat
    length: int

    def __repr__(self) -> str:
        """One line: what they are, not what they hold."""
        held = "every entry" if self.bitmap is None else f"{self.slots} slots"
        return f"Rows({np.dtype(self.dtype).name}{list(self.shape)}, {held}, {self.codec.name})"

    @property
    def codec(self) -> Codec:
        """How an entry is coded."""
        return self.format.codec

    @property
    def head_dim(self) -> int:
        """H."""
        return self.format.head_dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the entries that `to_array` gives."""
        return self.codec.result_dtype(self.format.dtype)

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes before those of the rows and their entries."""
        return self.payload.shape[: -2 if self._payload_is_array else -4]

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
        return self.format.room

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

        def place(entries: jax.Array) -> jax.Array:
            whole = entries if words is None else layout.expand(entries, words)
            return whole[..., : self.length, :]

        return _by_bits(place, self.format.decode(self.payload, self.scale))

    def mask(self) -> jax.Array:
        """Bool [..., S, H]: where an entry is held."""
        if self.bitmap is None:
            return jnp.ones(self.shape, bool)
        return layout.to_mask(self.bitmap)[..., : self.length, :]

    def map_rows(self, change: Callable[[jax.Array, int], jax.Array], length: int) -> "Rows":
        """The rows with other arrays: `change(array, unit)`, where one index of the rows' axis is `unit` rows."""
        changed: dict[str, Any] = {name: change(getattr(self, name), unit) for name, unit in self._units().items()}
        return dataclasses.replace(self, **changed, length=length)

    def specs(self, of_rows: Any, of_flags: Any) -> "Rows":
        """What stands for arrays of rows, and for the flags, in the arrays' places."""
        flags = None if self.overflow is None else of_flags
        return dataclasses.replace(self.map_rows(lambda _array, _unit: of_rows, self.length), overflow=flags)

    def take(self, start: jax.Array, length: int) -> "Rows":
        """Rows start .. start + length - 1, both multiples of 32; start may be traced."""

        def cut(x: jax.Array, unit: int) -> jax.Array:
            axis = len(self.leading)
            return lax.dynamic_slice_in_dim(x, start // unit, length // unit, axis=axis)

        return self.map_rows(cut, length)

    def put(self, update: "Rows", start: jax.Array, count: jax.Array | None = None) -> "Rows":
        """Overwrite whole groups of rows, which must be [B, K, S, H], at another place in each sequence.

        Args:
            update: [B, K, n, H] of the same format, n a multiple of 32.
            start: int32 [B], multiples of 32; a sequence whose start is S or more is left as it is.
            count: int32 [B], multiples of 32: how many of the n rows there are; see `write_rows`. All if None.
        """

        def write(name: str, unit: int) -> jax.Array:
            units = None if count is None else count // unit
            return write_rows(getattr(self, name), getattr(update, name), start // unit, units, axis=2)

        written: dict[str, Any] = {name: write(name, unit) for name, unit in self._units().items()}
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
        units = {"bitmap": 1, "payload": 1 if self._payload_is_array else WORD, "scale": 1}
        return {name: unit for name, unit in units.items() if getattr(self, name) is not None}

    @property
    def _payload_is_array(self) -> bool:
        """Whether the payload is an ordinary array [..., S', H], not groups of 32 tokens."""
        return self.bitmap is None and self.codec.bits is None


def _pad_tokens(x: jax.Array, count: int) -> jax.Array:
    """[..., S, H] with so many rows of zeros behind."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count), (0, 0)])


def _by_bits(move: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Move entries as integers: see `layout.to_bits`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return move(x)
    return lax.bitcast_convert_type(move(layout.to_bits(x)), x.dtype)


def pack(x: jax.Array, mask: jax.Array | np.ndarray | None = None, *, slots: int | None = None, bits: int = 16) -> Rows:
    """Store the vectors [..., S, H], or the masked entries of them.

    Args:
        x: [..., S, H]; bfloat16, float16 or float32. H is a multiple of 32 where there is a mask or there are codes.
        mask: bool of x's shape, True where an entry is held. Any mask: rows may be empty, full, or unequal. None holds
            every entry, without a bitmap.
        slots: entries that each row has room for, rounded up to a multiple of 4, or of 8 for codes of 4 bits; the
            longest row's count if None.
        bits: 16 stores entries as they are, whatever their dtype; 8, 4, 3 or 2 as codes with one bfloat16 scale a row;
            with a mask 8 or 4.

    Returns:
        The rows. In 16 bits `unpack` gives back where(mask, x, 0) bit for bit; in fewer the entries that the codes
        stand for, float32. Entries are moved as bits, through which no gradient flows: it is zero.

    Raises:
        ValueError: shapes that differ, H not a multiple of 32, slots < 1 or without a mask, a concrete mask with a row
            of more than `slots` entries, a traced mask without `slots`, bits that there are no codes of. A traced row
            that does not fit sets `overflow` instead.
        TypeError: another dtype of x, a mask that is not bool.
    """
    codec = codec_of("bits", bits, pruned=mask is not None)
    _check_pack(x, mask, coded=codec.bits is not None)
    form = RowFormat(x.shape[-1], np.dtype(x.dtype), None if mask is None else 1, codec)
    form = dataclasses.replace(form, slots=_resolve_slots(mask, slots, form))
    return form.pack(x, None if mask is None else jnp.asarray(mask))


def unpack(rows: Rows) -> jax.Array:
    """The array [..., S, H]: every held entry in its channel, zero elsewhere; TypeError for anything else."""
    if not isinstance(rows, Rows):
        raise TypeError(f"rows is of type {type(rows).__name__}; wanted Rows, as mustafar_jax.pack gives them")
    return rows.to_array()


def _check_pack(x: jax.Array, mask: jax.Array | np.ndarray | None, *, coded: bool) -> None:
    for name, array in (("x", x), ("mask", mask)):
        if array is not None and not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{name} is of type {type(array).__name__}; wanted an array")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"x has dtype {x.dtype}; wanted bfloat16, float16 or float32")
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; wanted [..., S, H]")
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask has shape {mask.shape}, x has {x.shape}; wanted the same, [..., S, H]")
    if (mask is not None or coded) and (x.shape[-1] % WORD or x.shape[-1] == 0):
        raise ValueError(f"x has head_dim {x.shape[-1]}; wanted a multiple of {WORD}")
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype}; wanted bool")


def _resolve_slots(mask: jax.Array | np.ndarray | None, slots: int | None, form: RowFormat) -> int | None:
    """Slots per row in a format, checked against the mask where that is concrete; None without a mask."""
    if slots is not None and slots < 1:
        raise ValueError(f"{slots=} must be at least 1")
    if mask is None:
        if slots is not None:
            raise ValueError(f"{slots=} wants a mask: without one, every entry is held")
        return None
    if isinstance(mask, jax.core.Tracer):
        if slots is None:
            raise ValueError("slots=None needs a concrete mask; under jit or vmap pass the rows' capacity")
        return slots
    longest = int(np.asarray(mask).sum(axis=-1).max(initial=0))
    given = dataclasses.replace(form, slots=max(1, longest) if slots is None else slots)
    if longest > given.room:
        raise ValueError(f"{slots=} is too few: a row of mask holds {longest} entries")
    return given.slots
