"""Products with a table of tiles: against numpy, compiled and interpreted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton import tile
from mustafar_jax.pallas_kernels.triton.tile import TOKENS, Rotations, TileReader
from tests.helpers import exhaustive, rms_error_ratio
from tests.pallas_kernels.data import WHERE, jit
from tests.pallas_kernels.lowering import lower_for_cuda

SHAPES = [(64, jnp.float16, 9), (128, jnp.bfloat16, 8), (64, jnp.bfloat16, 3), (128, jnp.float16, 1)]
"""head_dim, dtype, query heads."""


def table_words(reader, tiles, rotations):
    """Of tiles [n, H, TOKENS], what `TileReader.times_table` reads, as it does."""
    row, token = reader.table_order(rotations)
    return lax.bitcast_convert_type(tiles[:, row, token].reshape(-1, 2), jnp.int32)


def times_table(query, tiles, *, rotations, interpret):
    """Products of [16, H] with the last of n tiles [n, H, TOKENS]: float32 [rows / rotations, TOKENS].

    Each rotation's rows meet the table of the first one's tokens, and give scores for their own.
    """
    reader = TileReader(query.shape[1], query.dtype, interpret)
    last = tiles.shape[0] - 1
    rows = rotations.rows // rotations.count

    def kernel(query_ref, table_ref, out_ref):
        head, row = jnp.arange(16)[:, None], jnp.arange(reader.head_dim)[None, :]
        scores = reader.times_table(tl.load(query_ref.at[head, row]), table_ref, last, rotations)
        empty = jnp.zeros((16, reader.head_dim), reader.dtype)
        _, scores = reader.times_keys(reader.zeros(), empty, scores)  # puts them together
        column = tile.token_of_column(jnp.arange(TOKENS))
        mask = jnp.broadcast_to(head < rows, (16, TOKENS))
        tl.store(out_ref.at[head, column[None, :]], scores, mask=mask)

    shape = jax.ShapeDtypeStruct((rows, TOKENS), jnp.float32)
    call = tl.pallas_call(kernel, name="table", num_warps=tile.NUM_WARPS, interpret=interpret, out_shape=shape)
    return call(query, table_words(reader, tiles, rotations))


def arguments(head_dim, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((16, head_dim), (3, head_dim, TOKENS))]


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize(("head_dim", "dtype", "group"), [*SHAPES[:1], *exhaustive(*SHAPES[1:])])
def test_times_table(head_dim, dtype, group, interpret):
    rotations = Rotations.of(group)
    query, tiles = arguments(head_dim, dtype)
    call = functools.partial(times_table, rotations=rotations, interpret=interpret)
    actual = jit(call, interpret=interpret)(query, tiles)
    rotated = np.asarray(query, np.float32)[-rotations.rows :].reshape(rotations.count, -1, head_dim)
    last = np.asarray(tiles[-1], np.float32)
    _, token = TileReader(head_dim, dtype).table_order(rotations)
    expected = np.zeros(actual.shape, np.float32)
    for rows, ahead in zip(rotated, rotations.tokens, strict=True):
        expected[:, np.unique(token) + ahead] += rows @ last[:, np.unique(token)]
    assert rms_error_ratio(actual, expected) < 1e-5


@pytest.mark.parametrize(("head_dim", "dtype", "group"), SHAPES)
def test_times_table_lowers_for_cuda(head_dim, dtype, group):
    call = functools.partial(times_table, rotations=Rotations.of(group), interpret=False)
    assert "triton" in lower_for_cuda(call, *arguments(head_dim, dtype))


@pytest.mark.parametrize("group", range(1, 17))
def test_query_heads_and_rotations_have_rows_of_their_own(group):
    rotations = Rotations.of(group)
    head, rotation = rotations.place(np.arange(16 - rotations.rows, 16))
    places = set(zip(head.tolist(), rotation.tolist(), strict=True))
    assert len(places) == rotations.rows
    assert places >= set(itertools.product(range(group), range(rotations.count)))
    assert rotations.rows == 16 or group <= 16 - rotations.rows


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_table_and_its_rotations_hold_every_entry_once(head_dim, group):
    rotations = Rotations.of(group)
    row, token = TileReader(head_dim, jnp.bfloat16).table_order(rotations)
    tokens = token + rotations.tokens[:, None]
    np.testing.assert_array_equal(np.sort((row * TOKENS + tokens).ravel()), np.arange(head_dim * TOKENS))
