"""Rows of tokens as flat operands of a kernel, the call that attends splits of them, and how a tile is loaded."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax import layout
from mustafar_jax.layout import WORD
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.tile import NUM_WARPS, Entries
from mustafar_jax.rows import Rows


def flat(rows: Rows) -> list[jax.Array]:
    """Arrays with one flat row per KV head, which keeps a kernel's addresses cheap.

    With a bitmap: that, int32 [B * K, S * H / 32] and values int32 [B * K, S * slots / 2], two neighbouring slots to a
    word, the first in its low half: their bits are what is moved.
    """
    if rows.bitmap is None:
        return [rows.payload.reshape(math.prod(rows.leading), -1)]
    bitmap = lax.bitcast_convert_type(rows.bitmap, jnp.int32)
    pairs = rows.payload.reshape(*rows.payload.shape[:-1], rows.payload.shape[-1] // 2, 2)
    values = lax.bitcast_convert_type(pairs, jnp.int32)
    return [x.reshape(x.shape[0] * x.shape[1], -1) for x in (bitmap, values)]


def per_head(array: jax.Array, *, axis: int = 1) -> pl.BlockSpec:
    """The block of one KV head, all of it; the grid's `axis` counts heads."""
    return pl.BlockSpec((None, *array.shape[1:]), lambda *ids: (ids[axis],) + (0,) * (array.ndim - 1))


def attend_by_split(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    specs: Sequence[pl.BlockSpec],
    *,
    name: str,
    splits: int,
    queries: jax.Array,
    interpret: bool,
) -> list[jax.Array]:
    """Call a kernel for each split of each KV head's rows, the grid's two axes.

    Args:
        kernel: its last refs are the outputs: out [G, H], m [G], l [G].
        operands, specs: what it reads.
        name: of the kernel, as a profile shows it.
        splits: of a KV head.
        queries: [B * K, G, H], for their sizes.
        interpret: run as plain JAX, anywhere.

    Returns:
        float32 [B * K, splits, G, H], [B * K, splits, G] and the same.
    """
    heads, group, head_dim = queries.shape
    out_specs = [
        pl.BlockSpec((None, None, group, head_dim), lambda split, head: (head, split, 0, 0)),
        *[pl.BlockSpec((None, None, group), lambda split, head: (head, split, 0))] * 2,
    ]
    called: list[jax.Array] = tl.pallas_call(
        kernel,
        name=name,
        num_warps=NUM_WARPS,
        interpret=interpret,
        grid=(splits, heads),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct((heads, splits, group, *s), jnp.float32) for s in ((head_dim,), (), ())],
    )(*operands)
    return called


_AHEAD = 1
"""Chunks of slots that are on their way while one is stored."""
_ONCE = "evict_first"
"""Attention reads packed rows once: they need not push out of the first-level cache what is read again."""


def load_tile(
    bitmap_ref: tl.Ref, values_ref: tl.Ref, tokens: jax.Array, seen: jax.Array, *, head_dim: int, rows: int
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
    chunk = layout.chunk(2 * slots) // 2
    word = tokens[:, None] * row_words + jnp.arange(row_words)[None, :]
    mask = jnp.broadcast_to(seen[:, None], word.shape)
    words = tl.load(bitmap_ref.at[word], mask=mask, other=0, eviction_policy=_ONCE)
    # rows past the end are not seen; the last block is read in their place
    block = jnp.minimum(tokens // WORD, rows // WORD - 1) * (slots * WORD) + tokens % WORD * chunk
    place = block[:, None] + jnp.arange(chunk)[None, :]

    def load(i: Any) -> jax.Array:
        return tl.load(values_ref.at[place + i * (WORD * chunk)], eviction_policy=_ONCE)

    chunks = slots // chunk
    return Entries(tl.unstack(words), [load(min(i, chunks - 1)) for i in range(_AHEAD)], load, chunks)
