"""Products of dense queries or probabilities with packed rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.pallas_kernels.rows import why_not_rows
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton import launch, tile
from mustafar_jax.pallas_kernels.triton.rows import flat, load_tile, per_head
from mustafar_jax.pallas_kernels.triton.tile import COLUMNS, ROWS, TOKENS, TileReader
from mustafar_jax.rows import Rows


def why_not(dtype: Any, rows: Rows) -> str | None:
    """Why rows cannot be multiplied with what is of `dtype`, in words, or None."""
    if reason := why_not_rows(rows, dtype):
        return reason
    if rows.bitmap is None:
        return "the products want rows with a bitmap; these hold every entry"
    if rows.length == 0:
        return "the products want at least one row; got none"
    return tl.why_not(dtype=dtype, head_dim=rows.head_dim)


def _check(rows: Rows, dtype: Any) -> None:
    if reason := why_not(dtype, rows):
        raise NotImplementedError(reason)


def key_spmv(query: jax.Array, key: Rows, *, interpret: bool = False) -> jax.Array:
    """Scores of packed keys: query . key, unscaled.

    A block unpacks one tile of tokens and multiplies 16 query heads with it.

    Args:
        query: [B, K, G, H], the G query heads that share a KV head; any G.
        key: plain rows [B, K, S, H] of the query's dtype, with a bitmap.
        interpret: run as plain JAX, anywhere.

    Returns:
        float32 [B, K, G, S].

    Raises:
        NotImplementedError: see `why_not`.
    """
    batch, kv_heads, group, head_dim = query.shape
    rows = key.padded_length
    _check(key, query.dtype)
    reader = TileReader(head_dim, query.dtype, interpret)
    operands = [_pad(query, axis=2, multiple=ROWS), *flat(key)]
    parts = operands[0].shape[2] // ROWS
    operands[0] = operands[0].reshape(-1, parts, ROWS, head_dim)
    scores = tl.pallas_call(
        functools.partial(_key_kernel, reader=reader, rows=rows, group=group),
        name="key_spmv",
        num_warps=tile.NUM_WARPS,
        interpret=interpret,
        grid=(-(-rows // TOKENS), batch * kv_heads, parts),
        in_specs=[
            pl.BlockSpec((None, None, ROWS, head_dim), lambda i, head, part: (head, part, 0, 0)),
            *map(per_head, operands[1:]),
        ],
        out_specs=pl.BlockSpec((None, group, rows), lambda i, head, part: (head, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch * kv_heads, group, rows), jnp.float32),
    )(*operands)
    return scores.reshape(batch, kv_heads, group, rows)


def _key_kernel(
    q_ref: tl.Ref,  # [ROWS, H]
    bitmap_ref: tl.Ref,  # [S * H / 32]
    values_ref: tl.Ref,  # [S * slots / 2]
    out_ref: tl.Ref,  # [G, S]
    *,
    reader: TileReader,
    rows: int,
    group: int,
) -> None:
    """One tile, for ROWS query heads."""
    start = pl.program_id(0) * TOKENS
    tokens = start + jnp.arange(TOKENS, dtype=jnp.int32)
    entries = load_tile(bitmap_ref, values_ref, tokens, tokens < rows, head_dim=reader.head_dim, rows=rows)
    channel = tile.channel_of_row(jnp.arange(reader.head_dim), reader.head_dim)
    query = tl.load(q_ref.at[jnp.arange(ROWS)[:, None], channel[None, :]])
    _, scores = reader.times_keys(reader.scatter(reader.zeros(), entries), query, reader.no_scores())
    head = pl.program_id(2) * ROWS + jnp.arange(ROWS)[:, None]
    column = tile.token_of_column(tokens)
    tl.store(out_ref.at[head, column[None, :]], scores, mask=(head < group) & (column < rows)[None, :])


def value_spmv(
    probabilities: jax.Array, value: Rows, *, params: launch.DecodeParams | None = None, interpret: bool = False
) -> jax.Array:
    """Sums of packed values, weighted by attention probabilities.

    A block unpacks the tiles of its split one after another; the splits' sums are added in float32.

    Args:
        probabilities: [B, K, G, S], any G; rounded to the values' dtype.
        value: plain rows [B, K, S, H] with a bitmap.
        params: launch parameters; tuned ones for this device, or a heuristic, if None.
        interpret: run as plain JAX, anywhere.

    Returns:
        float32 [B, K, G, H].

    Raises:
        NotImplementedError: see `why_not`.
    """
    batch, kv_heads, group, rows = probabilities.shape
    heads, head_dim = batch * kv_heads, value.head_dim
    weights = probabilities.astype(value.dtype)
    _check(value, weights.dtype)
    weights = _pad(_pad(weights, axis=2, multiple=ROWS), axis=3, multiple=TOKENS)
    parts = weights.shape[2] // ROWS
    params = params or launch.decode_params(heads=heads * parts, rows=rows)
    operands = [weights.reshape(heads, parts, ROWS, -1), *flat(value)]
    kernel = functools.partial(
        _value_kernel,
        reader=TileReader(head_dim, weights.dtype, interpret),
        rows=rows,
        group=group,
        tiles_per_split=-(-rows // (TOKENS * params.splits)),
    )
    out = tl.pallas_call(
        kernel,
        name="value_spmv",
        num_warps=tile.NUM_WARPS,
        interpret=interpret,
        grid=(params.splits, heads, parts),
        in_specs=[
            pl.BlockSpec((None, None, ROWS, weights.shape[3]), lambda split, head, part: (head, part, 0, 0)),
            *map(per_head, operands[1:]),
        ],
        out_specs=pl.BlockSpec((None, None, group, head_dim), lambda split, head, part: (head, split, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((heads, params.splits, group, head_dim), jnp.float32),
    )(*operands)
    return out.sum(axis=1).reshape(batch, kv_heads, group, head_dim)


def _value_kernel(
    p_ref: tl.Ref,  # [ROWS, S padded to whole tiles]
    bitmap_ref: tl.Ref,  # [S * H / 32]
    values_ref: tl.Ref,  # [S * slots / 2]
    out_ref: tl.Ref,  # [G, H]
    *,
    reader: TileReader,
    rows: int,
    group: int,
    tiles_per_split: int,
) -> None:
    """One split, for ROWS query heads."""
    begin = pl.program_id(0) * tiles_per_split
    end = jnp.minimum(begin + tiles_per_split, -(-rows // TOKENS))

    def add(i: jax.Array, carry: tuple[list[jax.Array], tl.Memory]) -> tuple[list[jax.Array], tl.Memory]:
        out, memory = carry
        tokens = i * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        entries = load_tile(bitmap_ref, values_ref, tokens, tokens < rows, head_dim=reader.head_dim, rows=rows)
        column = tile.token_of_column(tokens, "tokens")
        weights = tl.load(p_ref.at[jnp.arange(ROWS)[:, None], column[None, :]])
        memory, out = reader.times_values(reader.scatter(memory, entries), weights, out, order="tokens")
        return out, memory

    zeros = [jnp.zeros((ROWS, COLUMNS), jnp.float32) for _ in range(reader.head_dim // COLUMNS)]
    out, _ = lax.fori_loop(begin, end, add, (zeros, reader.zeros()))
    head = pl.program_id(2) * ROWS + jnp.arange(ROWS)[:, None]
    for i, part in enumerate(out):
        channel = i * COLUMNS + jnp.arange(COLUMNS)[None, :]
        tl.store(out_ref.at[head, channel], part, mask=jnp.broadcast_to(head < group, part.shape))


def _pad(x: jax.Array, *, axis: int, multiple: int) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
