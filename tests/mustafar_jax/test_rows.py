"""Stored rows: exact roundtrips for every mask and value, the layout itself, products on it."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mustafar_jax as mj
from mustafar_jax import keep_count, key_spmv, pack, unpack, value_spmv
from mustafar_jax.codecs import PRUNED, WHOLE
from mustafar_jax.rows import RowFormat, Rows
from tests.helpers import DTYPES, adversarial, bits, exhaustive, magnitude_mask
from tests.helpers import pack as pack_jit
from tests.helpers import unpack as unpack_jit

SHAPES = [(40, 64), (2, 3, 33, 96), (2, 32, 128), (1, 5, 256)]


def random_mask(rng, shape):
    """Rows of every fullness, empty and full ones included, and words that are empty or full."""
    fullness = rng.choice([0.0, 0.02, 0.3, 0.7, 1.0], (*shape[:-1], shape[-1] // 32))
    row = rng.choice([0.0, 1.0, 2.0], (*shape[:-1], 1), p=[0.1, 0.8, 0.1])
    return rng.random(shape) < np.where(row == 1, np.repeat(fullness, 32, axis=-1), row)


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), shape=st.sampled_from(SHAPES))
def test_unpack_gives_back_what_was_packed(seed, dtype, shape):
    rng = np.random.default_rng(seed)
    x, mask = adversarial(rng, shape, dtype), random_mask(rng, shape)
    packed = pack_jit(x, mask, slots=shape[-1])
    expected = np.where(mask, bits(x), 0)
    np.testing.assert_array_equal(bits(unpack_jit(packed)), expected)
    assert not packed.overflow.any()
    assert (packed.shape, packed.dtype, packed.ndim) == (shape, dtype, len(shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *exhaustive(jnp.float16, jnp.float32)])
def test_concrete_masks_choose_the_slots(dtype):
    x = jnp.ones((2, 33, 64), dtype)
    mask = np.zeros(x.shape, bool)
    assert pack(x, mask).slots == 4
    mask[1, 2, :21] = True
    packed = pack(x, mask)
    assert packed.slots == 24
    assert packed.payload.shape == (2, 2, 3, 32, 8)
    assert pack(x, mask, slots=25).payload.shape == (2, 2, 7, 32, 4)
    np.testing.assert_array_equal(unpack_jit(packed), np.where(mask, 1, 0))


def test_layout():
    """The documented places of bits and entries."""
    rng = np.random.default_rng(0)
    x, mask = jnp.asarray(rng.standard_normal((40, 64)), jnp.float32), random_mask(rng, (40, 64))
    packed = pack(x, mask)
    words, values = np.asarray(packed.bitmap), np.asarray(packed.payload)
    chunk = values.shape[-1]
    assert words.shape == (64, 2)
    for token in range(64):
        kept = np.flatnonzero(mask[token]) if token < 40 else np.array([], int)
        assert [c for c in range(64) if words[token, c // 32] >> (c % 32) & 1] == list(kept)
        row = values[token // 32, :, token % 32].reshape(-1)
        np.testing.assert_array_equal(row[: len(kept)], np.asarray(x)[token % 40, kept])
        assert not row[len(kept) :].any()
    assert chunk in (4, 8)


def test_bytes_at_head_dim_128():
    """The sizes that the format is for: at most 0.40 and 0.58 of dense, bitmaps and flags included."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 4096, 128)), jnp.bfloat16)
    for sparsity, bound in ((0.7, 0.40), (0.5, 0.58)):
        packed = pack_jit(x, magnitude_mask(x, sparsity), slots=keep_count(128, sparsity))
        assert packed.nbytes <= bound * x.nbytes
        assert packed.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))


def test_a_traced_row_that_does_not_fit_sets_overflow_and_keeps_the_first_slots():
    x = jnp.arange(2 * 3 * 64, dtype=jnp.float32).reshape(2, 3, 64) + 1
    mask = np.zeros(x.shape, bool)
    mask[:, :, :8] = True
    mask[1, 2, :10] = True
    packed = pack_jit(x, mask, slots=8)
    np.testing.assert_array_equal(packed.overflow, [False, True])
    mask[1, 2, 8:] = False
    np.testing.assert_array_equal(unpack_jit(packed), np.where(mask, x, 0))


def test_vmap_equals_batch():
    rng = np.random.default_rng(3)
    x, mask = adversarial(rng, (4, 33, 64), jnp.bfloat16), random_mask(rng, (4, 33, 64))
    batched = pack_jit(x, mask, slots=64)
    mapped = jax.jit(jax.vmap(lambda x, mask: pack(x, mask, slots=64)))(x, mask)
    for one, other in zip(jax.tree.leaves(batched), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_array_equal(
            bits(one) if one.dtype == jnp.bfloat16 else one, bits(other) if one.dtype == jnp.bfloat16 else other
        )
    np.testing.assert_array_equal(bits(jax.jit(jax.vmap(unpack))(mapped)), bits(unpack_jit(batched)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
def test_products_equal_dense_ones(dtype, group):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((2, 3, 63, 64)), dtype)
    mask = random_mask(rng, x.shape)
    dense = np.where(mask, np.asarray(x).astype(np.float64), 0)
    packed = pack_jit(x, mask, slots=64)
    query = jnp.asarray(rng.standard_normal((2, 3, group, 64)), dtype)
    probabilities = jnp.asarray(rng.random((2, 3, group, 63)), jnp.float32)
    scores = np.einsum("bkgh,bksh->bkgs", np.asarray(query).astype(np.float64), dense)
    sums = np.einsum("bkgs,bksh->bkgh", np.asarray(probabilities).astype(np.float64), dense)
    for spmv, left, expected in ((key_spmv, query, scores), (value_spmv, probabilities, sums)):
        out = jax.jit(spmv)(left, packed)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, atol=1e-4)
        np.testing.assert_allclose(jax.jit(jax.vmap(spmv))(left, packed), expected, atol=1e-4)


KINDS = {
    "bitmap": lambda x: pack_jit(x, magnitude_mask(x, 0.5), slots=32),
    "every entry": pack_jit,
    "bitmap, 8 bits": lambda x: pack_jit(x, magnitude_mask(x, 0.5), slots=32, bits=8),
    "every entry, 8 bits": lambda x: pack_jit(x, bits=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_take_and_put_move_whole_groups(kind):
    rng = np.random.default_rng(6)
    packed = KINDS[kind](jnp.asarray(rng.standard_normal((2, 1, 128, 64)), jnp.float32))
    take, whole = jax.jit(Rows.take, static_argnums=2), np.asarray(unpack_jit(packed))
    np.testing.assert_array_equal(unpack_jit(take(packed, 32, 64)), whole[:, :, 32:96])
    moved = np.asarray(unpack_jit(jax.jit(Rows.put)(packed, take(packed, 0, 32), jnp.array([96, 128]))))
    np.testing.assert_array_equal(moved[0, :, 96:], whole[0, :, :32])
    np.testing.assert_array_equal(moved[0, :, :96], whole[0, :, :96])
    np.testing.assert_array_equal(moved[1], whole[1])  # its start is the end: nothing is written


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_is_held_without_a_mask(dtype):
    x = adversarial(np.random.default_rng(7), (2, 33, 48), dtype)
    rows = pack_jit(x)
    np.testing.assert_array_equal(bits(unpack_jit(rows)), bits(x))
    assert (rows.shape, rows.dtype, rows.ndim, rows.slots) == (x.shape, dtype, 3, 48)
    assert (rows.bitmap, rows.scale, rows.overflow) == (None, None, None)
    assert rows.mask().all()
    assert rows.nbytes == 2 * 64 * 48 * x.dtype.itemsize  # of whole groups of 32


def test_empty_holds_nothing():
    packed = RowFormat(64, np.dtype(jnp.bfloat16), 18).empty((2, 3), 40)
    assert packed.shape == (2, 3, 40, 64)
    assert packed.slots == 20
    assert not np.asarray(unpack_jit(packed)).any()


@pytest.mark.parametrize(
    ("slots", "codec"), [(None, codec) for codec in WHOLE.values()] + [(18, c) for c in PRUNED.values()]
)
def test_empty_rows_are_of_the_kind_that_packing_gives(slots, codec):
    how, x = RowFormat(64, np.dtype(jnp.bfloat16), slots, codec), jnp.ones((2, 40, 64), jnp.bfloat16)
    packed = jax.eval_shape(how.pack, x, None if slots is None else x > 0)
    empty = how.empty((2,), 40)
    assert jax.tree.structure(empty) == jax.tree.structure(packed)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(rows)] for rows in (empty, packed)]
    assert kinds[0] == kinds[1]
    assert not np.asarray(unpack_jit(empty)).any()


X = jnp.ones((4, 64))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"mask has shape \(4, 32\), x has \(4, 64\)", lambda: pack(X, np.ones((4, 32), bool))),
        (ValueError, r"wanted \[\.\.\., S, H\]", lambda: pack(X[0], np.ones(64, bool))),
        (ValueError, "head_dim 48; wanted a multiple of 32", lambda: pack(X[:, :48], np.ones((4, 48), bool))),
        (TypeError, "mask has dtype float64; wanted bool", lambda: pack(X, np.ones((4, 64)))),
        (TypeError, "x has dtype int32; wanted", lambda: pack(X.astype(int), np.ones((4, 64), bool))),
        (ValueError, "slots=0 must be at least 1", lambda: pack(X, np.ones((4, 64), bool), slots=0)),
        (ValueError, "slots=60 is too few: a row of mask holds 64", lambda: pack(X, np.ones((4, 64), bool), slots=60)),
        (ValueError, "slots=None needs a concrete mask", lambda: jax.jit(pack)(X, np.ones((4, 64), bool))),
        (ValueError, r"x has shape \(64,\); wanted \[\.\.\., S, H\]", lambda: pack(X[0])),
        (
            TypeError,
            r"bits=\[8\] must be an integer, one of \[16, 8, 4, 3, 2\]",
            lambda: pack(X, bits=cast("Any", [8])),
        ),
        (TypeError, "x is of type list; wanted an array", lambda: pack(cast("Any", [[1.0]]))),
        (TypeError, "packed is of type ArrayImpl; wanted Rows", lambda: key_spmv(X[:1], cast("Any", X))),
        (ValueError, r"query has shape \(1, 32\)", lambda: key_spmv(X[:1, :32], pack(X, X > 0))),
        (ValueError, r"probabilities has shape \(64,\)", lambda: value_spmv(X[0], pack(X, X > 0))),
    ],
)
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_what_rows_and_caches_show_at_a_prompt_is_short():
    rows = pack_jit(jnp.ones((8, 64, 64)), jnp.ones((8, 64, 64), bool), slots=64)
    assert repr(rows) == "Rows(float32[8, 64, 64], 64 slots, plain numbers)"
    assert repr(pack_jit(jnp.ones((8, 64, 64)), bits=8)) == "Rows(float32[8, 64, 64], every entry, codes of 8 bits)"
    assert repr(jax.eval_shape(lambda: rows)) == repr(rows)


def test_the_old_name_of_rows_still_works():
    with pytest.warns(DeprecationWarning, match=r"BitmapArray is now mustafar_jax\.Rows"):
        assert mj.BitmapArray is Rows


def test_rows_that_are_left_alone_set_no_flag():
    """A group that would not fit, of a sequence that has nothing to write."""
    empty = RowFormat(64, np.dtype(jnp.float32), 8).empty((2, 1), 64)
    too_many = RowFormat(64, np.dtype(jnp.float32), 8).pack(jnp.ones((2, 1, 32, 64)), jnp.ones((2, 1, 32, 64), bool))
    assert too_many.overflow is not None
    assert too_many.overflow.all()
    held = empty.put(too_many, jnp.array([0, 64])).overflow
    np.testing.assert_array_equal(held, [[True], [False]])
