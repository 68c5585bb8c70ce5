"""Codes of 8 bits: the levels, the scale, rows that are not ordinary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mustafar_jax import magnitude_mask, pack, unpack
from tests.helpers import DTYPES, adversarial

pack_jit = jax.jit(pack, static_argnames=("slots", "bits"))
unpack_jit = jax.jit(unpack)


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), masked=st.booleans())
def test_an_entry_is_its_nearest_level(seed, dtype, masked):
    """Of rows with few and with many entries, small, large and skewed ones; every entry within half a step."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-5, 5, (2, 40, 1)))
    x = jnp.asarray(rng.standard_normal((2, 40, 64)) * sizes * rng.choice([1, 20], (1, 1, 64)), dtype)
    mask = magnitude_mask(x, 0.7) if masked else jnp.ones(x.shape, bool)
    rows = pack_jit(x, mask if masked else None, slots=20 if masked else None, bits=8)
    held, kept, mask = np.asarray(unpack_jit(rows)), np.where(mask, x, 0).astype(np.float64), np.asarray(mask)
    assert held.dtype == np.float32
    assert not held[~mask].any()
    largest = np.float32(np.abs(kept).max(axis=-1)) / np.float32(127.5)
    step = np.asarray(rows.scale[:, :40]).astype(np.float64)[..., None]
    np.testing.assert_allclose(step[..., 0], largest, rtol=2**-8)
    step = np.broadcast_to(step, x.shape)[mask]
    levels, error = held[mask].astype(np.float64) / step, np.abs(held - kept)[mask]
    np.testing.assert_array_equal(levels % 1, 0.5)
    assert np.abs(levels).max() <= 127.5
    assert (error <= 0.505 * step).all()  # the largest entry may be a little beyond the last level


def test_unpacked_entries_are_level_times_scale_exactly():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32, 64)), jnp.bfloat16)
    rows = pack(x, bits=8)
    exact = (np.asarray(rows.payload).astype(np.float64) + 0.5) * np.asarray(rows.scale).astype(np.float64)[..., None]
    np.testing.assert_array_equal(np.asarray(unpack(rows)).astype(np.float64), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_are_not_ordinary(dtype, masked):
    """Zeros, one entry, the largest numbers; NaN and infinity, which make their own row not finite and no other."""
    x = np.zeros((8, 64), np.float32)
    x[1, 7], x[2], x[3, 0], x[4, 5] = -3, float(jnp.finfo(dtype).max), np.nan, -np.inf
    x[5:] = np.random.default_rng(0).standard_normal((3, 64))
    x = jnp.asarray(x, dtype)
    rows = pack(x, x != 0, bits=8) if masked else pack(x, bits=8)
    held, scale = np.asarray(unpack(rows)), np.asarray(rows.scale).astype(np.float32)
    assert scale[0] == 0
    assert not held[0].any()
    np.testing.assert_allclose(held[1, 7], -3, rtol=0.01)
    np.testing.assert_allclose(held[2], np.asarray(x[2], np.float32), rtol=0.01)
    assert not np.isfinite(scale[3:5]).any()
    assert not np.isfinite(held[3, 0])
    assert not np.isfinite(held[4, 5])
    others = [0, 1, 2, 5, 6, 7]
    assert np.isfinite(scale[others]).all()
    assert np.isfinite(held[others]).all()


def test_a_row_does_not_depend_on_the_others():
    x = adversarial(np.random.default_rng(1), (64, 64), jnp.bfloat16)
    alone = [unpack(pack(x[i : i + 1], bits=8)) for i in range(0, 64, 7)]
    np.testing.assert_array_equal(unpack(pack(x, bits=8))[::7], jnp.concatenate(alone))


def test_bytes():
    """A byte an entry and two a row, beside the bitmap and a flag."""
    x = jnp.ones((2, 3, 64, 128), jnp.bfloat16)
    assert pack(x, bits=8).nbytes == x.size + 2 * x.size // 128
    mask = magnitude_mask(x, 0.7)
    assert pack(x, mask, bits=8).nbytes == (40 + 2 + 16) * x.size // 128 + 6


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"bits=4 must be one of \[16, 8\]", {"bits": 4}),
        ("bits='8' must be one of", {"bits": "8"}),
        ("slots=8 wants a mask", {"bits": 8, "slots": 8}),
    ],
)
def test_bad_arguments(message, options):
    with pytest.raises(ValueError, match=message):
        pack(jnp.ones((4, 64)), **options)
