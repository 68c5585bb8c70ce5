"""Bitmap plus packed nonzeros: the format that keeps a pruned cache small (arXiv 2505.22913, section 4).

The layout differs from the published one (mustafar_jax.interop exports that): keys and values alike have one row per
token, and every row has the same number of slots, so nothing needs offsets and a group of tokens is appended by a write
at a known place. docs/architecture.md draws it.
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

from mustafar_jax.implementations import Implementation, check_implementation, first_that_runs, kernels, kernels_or_xla
from mustafar_jax.writes import write_rows

WORD = 32
"""Channels per bitmap word, and tokens that are interleaved in one block of values."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bitmap", "values", "overflow"], meta_fields=["length"]
)
@dataclasses.dataclass(frozen=True)
class BitmapArray:
    """Rows of head_dim entries of which only some are held: [..., S, H], packed along H. A pytree.

    Invariants, for every row (a token of one head):
        - bit c % 32 of word c // 32 is set exactly where channel c is held;
        - the held entries stand in the row's slots in channel order; the free slots behind them are zero;
        - no row holds more than `slots` entries: where a traced mask asked for more, the first `slots` are held and
          `overflow` is set for that leading index;
        - rows from `length` on, up to the next multiple of 32, hold nothing.

    Attributes:
        bitmap: uint32 [..., S', H / 32], S' being S rounded up to a multiple of 32.
        values: [..., S' / 32, slots / chunk, 32, chunk]: 32 tokens interleaved in chunks of 8 slots (4 where slots is
            not a multiple of 8), so that 32 lanes reading a chunk each, of neighbouring tokens, read one block.
        overflow: bool [...], whether any row under this leading index did not fit.
        length: S, the rows that there are to its user.
    """

    bitmap: jax.Array
    values: jax.Array
    overflow: jax.Array
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., S, H], of the dense array that this stands for."""
        return (*self.bitmap.shape[:-2], self.length, self.bitmap.shape[-1] * WORD)

    @property
    def ndim(self) -> int:
        """Axes of `shape`."""
        return self.bitmap.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the entries."""
        return self.values.dtype

    @property
    def slots(self) -> int:
        """Entries that a row has room for."""
        return self.values.shape[-3] * self.values.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held: bitmap, values and overflow flags."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in (self.bitmap, self.values, self.overflow))


def pack(x: jax.Array, mask: jax.Array | np.ndarray, *, slots: int | None = None) -> BitmapArray:
    """Pack the masked entries of [..., S, H].

    Args:
        x: [..., S, H], H a multiple of 32; bfloat16, float16 or float32.
        mask: bool of x's shape, True where an entry is held. Any mask: rows may be empty, full, or unequal.
        slots: entries that each row has room for, rounded up to a multiple of 4; the longest row's count if None.

    Returns:
        The packed array; `unpack` gives back where(mask, x, 0) bit for bit. Entries are moved as bits, through which no
        gradient flows: it is zero.

    Raises:
        ValueError: shapes that differ, H not a multiple of 32, slots < 1, a concrete mask with a row of more than
            `slots` entries, or a traced mask without `slots`. A traced row that does not fit sets `overflow` instead.
        TypeError: another dtype of x, a mask that is not bool.
    """
    _check_pack(x, mask)
    slots = _resolve_slots(mask, slots)
    length = x.shape[-2]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -length % WORD), (0, 0)]
    entries, mask = jnp.pad(_to_bits(x), padding), jnp.pad(jnp.asarray(mask), padding)
    rank = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    held = mask & (rank < slots)
    overflow = jnp.any(mask & ~held, axis=(-2, -1))
    values = lax.bitcast_convert_type(_interleave(_compress(entries, held, rank, slots)), x.dtype)
    return BitmapArray(_to_words(held), values, overflow, length)


def unpack(packed: BitmapArray) -> jax.Array:
    """The dense array [..., S, H]: every held entry in its channel, zero elsewhere; TypeError for anything else."""
    if not isinstance(packed, BitmapArray):
        raise TypeError(f"packed is of type {type(packed).__name__}; wanted a BitmapArray")
    below = packed.bitmap[..., None] & ((jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)) - 1)
    counts = lax.population_count(packed.bitmap).astype(jnp.int32)
    before = jnp.cumsum(counts, axis=-1) - counts
    rank = before[..., None] + lax.population_count(below).astype(jnp.int32)
    dense = (*packed.bitmap.shape[:-1], packed.bitmap.shape[-1] * WORD)
    # clip: a bitmap that nobody has written may ask for slots that are not there
    slots = _deinterleave(_to_bits(packed.values))
    entries = jnp.take_along_axis(slots, rank.reshape(dense), axis=-1, mode="clip")
    rows = jnp.where(held(packed), entries[..., : packed.length, :], 0)
    return lax.bitcast_convert_type(rows, packed.dtype)


def held(packed: BitmapArray) -> jax.Array:
    """The mask, bool [..., S, H]: where an entry is held."""
    bits = packed.bitmap[..., None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
    rows = bits.astype(bool).reshape(*packed.bitmap.shape[:-1], packed.bitmap.shape[-1] * WORD)
    return rows[..., : packed.length, :]


def key_spmv(query: jax.Array, packed: BitmapArray, *, implementation: Implementation = None) -> jax.Array:
    """Scores of packed keys: query . key, unscaled.

    Args:
        query: [..., G, H], the G query heads that share a KV head.
        packed: keys [..., S, H].
        implementation: "triton" (NVIDIA GPUs; bfloat16 and float16, the same for both arguments, head_dim 64 and 128),
            "xla", a sequence of names tried in order (only NotImplementedError passes on to the next), or None for the
            best that works here.

    Returns:
        float32 [..., G, S].

    Raises:
        ValueError: shapes that do not fit, an unknown implementation.
        NotImplementedError: no implementation that was named can run this.
    """
    _check_spmv("query", query, packed, packed.shape[-1])
    return _product("key_spmv", query, packed, implementation)


def value_spmv(probabilities: jax.Array, packed: BitmapArray, *, implementation: Implementation = None) -> jax.Array:
    """Sums of packed values, weighted by attention probabilities.

    Args:
        probabilities: [..., G, S].
        packed: values [..., S, H].
        implementation: as in `key_spmv`; for "triton" the probabilities must have the values' dtype.

    Returns:
        float32 [..., G, H].

    Raises:
        ValueError, NotImplementedError: as `key_spmv`.
    """
    _check_spmv("probabilities", probabilities, packed, packed.shape[-2])
    return _product("value_spmv", probabilities, packed, implementation)


def _product(product: str, x: jax.Array, packed: BitmapArray, implementation: Implementation) -> jax.Array:
    """The product of a name by the first implementation that can run."""

    def run(name: str) -> jax.Array:
        if name not in _PRODUCTS:
            raise NotImplementedError(f"implementation={name!r} attends caches; {product} wants one of {[*_PRODUCTS]}")
        return _PRODUCTS[name](product, x, packed)

    names = check_implementation(implementation) or kernels_or_xla()
    return first_that_runs(names, run)


def _product_xla(product: str, x: jax.Array, packed: BitmapArray) -> jax.Array:
    letters = {"key_spmv": "...gh,...sh->...gs", "value_spmv": "...gs,...sh->...gh"}[product]
    return jnp.einsum(letters, *_float32(x, unpack(packed)), precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
@functools.partial(jax.jit, static_argnums=(0, 3))  # so that a call outside jit does not compile each time
def _product_triton(product: str, x: jax.Array, packed: BitmapArray, interpret: bool = False) -> jax.Array:
    spmv = kernels("triton.spmv")
    if x.dtype != packed.dtype:
        raise NotImplementedError(f"the kernels take one dtype; got {x.dtype} and rows of {packed.dtype}")
    leading, rows = x.shape[:-2], packed.bitmap.shape[-2]
    if rows == 0:
        raise NotImplementedError("the kernels take at least one row; got none")
    by_head = kernels("rows").Packed(
        *(y.reshape(-1, 1, *y.shape[len(leading) :]) for y in (packed.bitmap, packed.values))
    )
    x = x.reshape(-1, 1, *x.shape[-2:])
    if product == "key_spmv":
        out: jax.Array = spmv.key_spmv(x, by_head, interpret=interpret)[..., : packed.length]
    else:
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, rows - packed.length)])
        out = spmv.value_spmv(x, by_head, interpret=interpret)
    return out.reshape(*leading, *out.shape[-2:])


@_product_triton.defjvp
def _product_tangent(
    product: str, interpret: bool, primals: tuple[jax.Array, BitmapArray], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    """Linear in x; no gradient flows through packed entries: see `pack`."""
    return _product_triton(product, *primals, interpret), _product_xla(product, tangents[0], primals[1])


_PRODUCTS: dict[str, Callable[[str, jax.Array, BitmapArray], jax.Array]] = {
    "triton": _product_triton,
    "xla": _product_xla,
}
"""The implementations of the sparse products."""


def empty(leading: tuple[int, ...], length: int, head_dim: int, slots: int, dtype: jnp.dtype) -> BitmapArray:
    """A packed array [*leading, length, head_dim] that holds nothing."""
    slots = _round_slots(slots)
    padded = length + -length % WORD
    chunk = _chunk(slots)
    return BitmapArray(
        jnp.zeros((*leading, padded, head_dim // WORD), jnp.uint32),
        jnp.zeros((*leading, padded // WORD, slots // chunk, WORD, chunk), dtype),
        jnp.zeros(leading, bool),
        length,
    )


def take(packed: BitmapArray, start: jax.Array, length: int) -> BitmapArray:
    """Rows start .. start + length - 1, both multiples of 32; start may be traced."""
    bitmap = lax.dynamic_slice_in_dim(packed.bitmap, start, length, axis=-2 + packed.bitmap.ndim)
    values = lax.dynamic_slice_in_dim(packed.values, start // WORD, length // WORD, axis=packed.values.ndim - 4)
    return BitmapArray(bitmap, values, packed.overflow, length)


def put(packed: BitmapArray, update: BitmapArray, start: jax.Array) -> BitmapArray:
    """Overwrite whole groups of rows of [B, K, S, H], at another place in each sequence.

    Args:
        packed: [B, K, S, H].
        update: [B, K, n, H] of the same slots, n a multiple of 32.
        start: int32 [B], multiples of 32; a sequence whose start is S or more is left as it is.
    """
    written = start < packed.shape[2]
    return BitmapArray(
        write_rows(packed.bitmap, update.bitmap, start, axis=2),
        write_rows(packed.values, update.values, start // WORD, axis=2),
        packed.overflow | (update.overflow & written[:, None]),
        packed.length,
    )


def _check_pack(x: jax.Array, mask: jax.Array | np.ndarray) -> None:
    if x.ndim < 2 or mask.shape != x.shape:
        raise ValueError(f"mask has shape {mask.shape}, x has {x.shape}; wanted the same, [..., S, H]")
    if x.shape[-1] % WORD or x.shape[-1] == 0:
        raise ValueError(f"x has head_dim {x.shape[-1]}; wanted a multiple of {WORD}")
    if mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype}; wanted bool")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"x has dtype {x.dtype}; wanted bfloat16, float16 or float32")


def _resolve_slots(mask: jax.Array | np.ndarray, slots: int | None) -> int:
    """Slots per row, checked against the mask where that is concrete."""
    if slots is not None and slots < 1:
        raise ValueError(f"{slots=} must be at least 1")
    if isinstance(mask, jax.core.Tracer):
        if slots is None:
            raise ValueError("slots=None needs a concrete mask; under jit or vmap pass the rows' capacity")
        return _round_slots(slots)
    longest = int(np.asarray(mask).sum(axis=-1).max(initial=0))
    rounded = _round_slots(longest if slots is None else slots)
    if longest > rounded:
        raise ValueError(f"{slots=} is too few: a row of mask holds {longest} entries")
    return rounded


def _round_slots(slots: int) -> int:
    return 4 * math.ceil(max(slots, 1) / 4)


def _check_spmv(name: str, x: jax.Array, packed: BitmapArray, wanted: int) -> None:
    if x.ndim != packed.ndim or x.shape[:-2] != packed.shape[:-2] or x.shape[-1] != wanted:
        raise ValueError(
            f"{name} has shape {x.shape}; wanted [*{packed.shape[:-2]}, G, {wanted}] for packed {packed.shape}"
        )


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.astype(jnp.float32) for array in arrays)


def _to_words(mask: jax.Array) -> jax.Array:
    """bool [..., H] -> uint32 [..., H / 32]."""
    bits = mask.reshape(*mask.shape[:-1], mask.shape[-1] // WORD, WORD).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _to_bits(x: jax.Array) -> jax.Array:
    """The entries' bits: moved as integers, every NaN stays as it is, also where XLA has no 16-bit floating point."""
    return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


def _compress(entries: jax.Array, held: jax.Array, rank: jax.Array, slots: int) -> jax.Array:
    """The held entries of each row, in order, in its first slots: [..., H] -> [..., slots]."""
    *leading, head_dim = entries.shape
    # Entries that are not held go to places beyond the slots, a different one each, where the scatter drops them.
    slot = jnp.where(held, rank, slots + jnp.arange(head_dim)).reshape(-1, head_dim)
    row = jnp.arange(slot.shape[0])[:, None]
    rows = jnp.zeros((slot.shape[0], slots), entries.dtype)
    rows = rows.at[row, slot].set(entries.reshape(-1, head_dim), mode="drop", unique_indices=True)
    return rows.reshape(*leading, slots)


def _chunk(slots: int) -> int:
    return 8 if slots % 8 == 0 else 4


def _interleave(rows: jax.Array) -> jax.Array:
    """[..., S', slots] -> [..., S' / 32, slots / chunk, 32, chunk]."""
    *leading, length, slots = rows.shape
    chunk = _chunk(slots)
    return rows.reshape(*leading, length // WORD, WORD, slots // chunk, chunk).swapaxes(-3, -2)


def _deinterleave(values: jax.Array) -> jax.Array:
    """The inverse of `_interleave`."""
    *leading, groups, chunks, _, chunk = values.shape
    return values.swapaxes(-3, -2).reshape(*leading, groups * WORD, chunks * chunk)
