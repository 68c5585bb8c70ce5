"""Products with a table of tiles: against numpy, compiled and interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mustafar_jax.pallas_kernels import tile, triton
from mustafar_jax.pallas_kernels.tile import TOKENS, TileReader
from tests.helpers import rms_error_ratio
from tests.pallas_kernels.data import WHERE, jit
from tests.pallas_kernels.lowering import lower_for_cuda

SHAPES = [(64, jnp.float16), (128, jnp.bfloat16)]  # head_dim, dtype


def table_words(reader, tiles):
    """Tiles [n, H, TOKENS] as `TileReader.times_table` reads them."""
    row, token = reader.table_order()
    return lax.bitcast_convert_type(tiles[:, row, token].reshape(-1, 2), jnp.int32)


def times_table(query, tiles, *, interpret):
    """Products of [16, H] with the last of n tiles [n, H, TOKENS]: float32 [16, TOKENS]."""
    reader = TileReader(query.shape[1], query.dtype, interpret)
    last = tiles.shape[0] - 1

    def kernel(query_ref, table_ref, out_ref):
        head, row = jnp.arange(16)[:, None], jnp.arange(reader.pairs)[None, :]
        halves = [triton.load(query_ref.at[head, row + half]) for half in (0, reader.pairs)]
        scores = reader.times_table(halves, table_ref, last)
        empty = jnp.zeros((16, reader.head_dim), reader.dtype)
        _, scores = reader.times_keys(reader.zeros(), empty, scores)  # puts them together
        column = tile.token_of_column(jnp.arange(TOKENS))
        triton.store(out_ref.at[head, column[None, :]], scores)

    shape = jax.ShapeDtypeStruct((16, TOKENS), jnp.float32)
    call = triton.pallas_call(kernel, name="table", num_warps=tile.NUM_WARPS, interpret=interpret, out_shape=shape)
    return call(query, table_words(reader, tiles))


def arguments(head_dim, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((16, head_dim), (3, head_dim, TOKENS))]


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize(("head_dim", "dtype"), SHAPES)
def test_times_table(head_dim, dtype, interpret):
    query, tiles = arguments(head_dim, dtype)
    actual = jit(functools.partial(times_table, interpret=interpret), interpret=interpret)(query, tiles)
    expected = np.asarray(query, np.float32) @ np.asarray(tiles[-1], np.float32)
    assert rms_error_ratio(actual, expected) < 1e-5


@pytest.mark.parametrize(("head_dim", "dtype"), SHAPES)
def test_times_table_lowers_for_cuda(head_dim, dtype):
    call = functools.partial(times_table, interpret=False)
    assert "triton" in lower_for_cuda(call, *arguments(head_dim, dtype))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_table_holds_every_entry_once(head_dim):
    row, token = TileReader(head_dim, jnp.bfloat16).table_order()
    np.testing.assert_array_equal(np.sort(row * TOKENS + token), np.arange(head_dim * TOKENS))
