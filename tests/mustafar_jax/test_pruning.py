"""Which entries are kept: exact counts, ties, the order of special values; rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mustafar_jax import keep_count, magnitude_mask
from mustafar_jax.pruning import rescale_to_norm
from tests.helpers import DTYPES, adversarial, bits

mask_of = jax.jit(magnitude_mask, static_argnums=1)


def expected_mask(x, count):
    """The rule as a sort: by magnitude's bits, NaN being one value above infinity, then by index."""
    magnitude = bits(x) & (np.iinfo(bits(x).dtype).max >> 1)
    magnitude = np.where(np.isnan(np.asarray(x).astype(np.float32)), np.iinfo(magnitude.dtype).max, magnitude)
    order = np.argsort(-magnitude.astype(np.int64), axis=-1, kind="stable")
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[..., :count], True, axis=-1)
    return mask


@pytest.mark.parametrize(
    ("size", "sparsity", "kept"),
    [
        (128, 0.7, 40),
        (128, 0.5, 64),
        (128, 0.0, 128),
        (64, 0.7, 20),
        (64, 0.001, 64),
        (96, 0.75, 24),
        (256, 0.999, 4),
        (40, 0.7, 12),  # (1 - 0.7) * 40 is a little above 12 in binary floating point
        (20, 0.8, 4),
        (6, 0.1, 8),
    ],
)
def test_keep_count(size, sparsity, kept):
    assert keep_count(size, sparsity) == kept


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity=.* must be the fraction removed, in \[0, 1\)"):
        keep_count(128, sparsity)
    with pytest.raises(ValueError, match="sparsity"):
        magnitude_mask(jnp.ones(64), sparsity)


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), sparsity=st.sampled_from([0.3, 0.5, 0.7, 0.95]))
def test_magnitude_mask_equals_a_sort(seed, dtype, sparsity):
    x = adversarial(np.random.default_rng(seed), (3, 5, 64), dtype)
    mask = np.asarray(mask_of(x, sparsity))
    assert (mask.sum(axis=-1) == keep_count(64, sparsity)).all()
    np.testing.assert_array_equal(mask, expected_mask(x, keep_count(64, sparsity)))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_mask_of_every_head_dim(head_dim, dtype):
    x = adversarial(np.random.default_rng(head_dim), (7, head_dim), dtype)
    np.testing.assert_array_equal(magnitude_mask(x, 0.7), expected_mask(x, keep_count(head_dim, 0.7)))


def test_equal_magnitudes_keep_the_lowest_index():
    x = jnp.array([1.0, -2.0, 2.0, -1.0, 2.0, 1.0, -2.0, 0.0])
    np.testing.assert_array_equal(magnitude_mask(x, 0.5), [0, 1, 1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(magnitude_mask(jnp.ones(8), 0.5), [1, 1, 1, 1, 0, 0, 0, 0])


def test_subnormals_count():
    tiny = float(jnp.finfo(jnp.float32).smallest_subnormal)
    x = jnp.asarray(np.array([0.0, tiny, 0.0, -2 * tiny, 0.0, tiny, 0.0, tiny], np.float32))
    np.testing.assert_array_equal(magnitude_mask(x, 0.5), [0, 1, 0, 1, 0, 1, 0, 1])


def test_axis_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32, 6)), jnp.float32)
    along_last = magnitude_mask(x.swapaxes(1, 2), 0.5).swapaxes(1, 2)
    np.testing.assert_array_equal(magnitude_mask(x, 0.5, axis=1), along_last)
    np.testing.assert_array_equal(jax.vmap(lambda y: magnitude_mask(y, 0.5, axis=0))(x), along_last)


def test_more_wanted_than_there_are_keeps_all():
    assert magnitude_mask(jnp.arange(6.0), 0.1).all()


def test_unsupported_dtype():
    with pytest.raises(TypeError, match="x has dtype int32; wanted bfloat16, float16 or float32"):
        magnitude_mask(jnp.arange(8), 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescaled_vectors_keep_their_norm(dtype):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((50, 64)), dtype)
    mask = magnitude_mask(x, 0.7)
    rescaled = rescale_to_norm(x, mask)
    assert rescaled.dtype == dtype
    np.testing.assert_array_equal(bits(rescaled)[~np.asarray(mask)], bits(x)[~np.asarray(mask)])
    norm, kept = (np.linalg.norm(np.asarray(v).astype(np.float64), axis=-1) for v in (x, jnp.where(mask, rescaled, 0)))
    np.testing.assert_allclose(kept, norm, rtol=2e-3 if dtype == jnp.bfloat16 else 5e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rescaling_special_vectors(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray(np.array([[0, 0, 0, 0], [np.inf, 1, 2, 3], [np.nan, 1, 2, 3], [largest] * 4]), dtype)
    mask = jnp.asarray(np.array([[1, 0, 0, 0]] * 4, bool))
    rescaled = np.asarray(rescale_to_norm(x, mask)).astype(np.float32)
    assert rescaled[0, 0] == 0
    assert rescaled[1, 0] == np.inf
    assert np.isnan(rescaled[2, 0])
    # Twice the largest number is clipped to it; in float32 the norm itself overflows, and the factor is 1.
    assert rescaled[3, 0] == np.float32(largest)
