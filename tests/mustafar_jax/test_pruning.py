"""Which entries are kept: exact counts, ties, the order of special values; rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mustafar_jax import keep_count, magnitude_mask
from mustafar_jax.pruning import KEY_METHODS, VALUE_METHODS, Context, rescale_to_norm
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


# The other rules, against sorts written out in numpy.

BATCH, KV_HEADS, TOKENS, HEAD_DIM, QUERIES = 2, 2, 64, 32, 6


def entries_and_context(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, KV_HEADS, TOKENS, HEAD_DIM)).astype(np.float32)
    queries = rng.standard_normal((BATCH, KV_HEADS, QUERIES, HEAD_DIM)).astype(np.float32)
    attention = rng.random((BATCH, KV_HEADS, TOKENS)).astype(np.float32)
    valid = np.array([[True] * 64, [True] * 32 + [False] * 32])
    return x, Context(*map(jnp.asarray, (valid, queries, attention)))


def top(score, count, axis):
    """True at the `count` largest along an axis."""
    rank = np.argsort(np.argsort(-score, axis=axis), axis=axis)
    return rank < count


def mask_by(methods, name, x, sparsity, context):
    return np.asarray(jax.jit(methods[name].mask, static_argnums=1)(jnp.asarray(x), sparsity, context))


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 16), (0.7, 12)])
def test_output_aware_keys_weigh_channels_by_the_queries(sparsity, kept):
    x, context = entries_and_context()
    weight = np.abs(np.asarray(context.queries)).sum(axis=2, keepdims=True)
    mask = mask_by(KEY_METHODS, "output_aware", x, sparsity, context)
    np.testing.assert_array_equal(mask, top(np.abs(x) * weight, kept, axis=-1))
    assert (mask != mask_by(KEY_METHODS, "magnitude", x, sparsity, context)).any()


@pytest.mark.parametrize(("sparsity", "kept"), [(0.5, 16), (0.7, 10), (0.999, 1)])
@pytest.mark.parametrize("name", ["channel_magnitude", "channel_output_aware"])
def test_channels_keep_their_largest_of_each_32_tokens(name, sparsity, kept):
    x, context = entries_and_context()
    score = np.abs(x) * (np.asarray(context.attention)[..., None] if name == "channel_output_aware" else 1)
    groups = score.reshape(BATCH, KV_HEADS, TOKENS // 32, 32, HEAD_DIM)
    expected = top(groups, kept, axis=3).reshape(x.shape)
    np.testing.assert_array_equal(mask_by(VALUE_METHODS, name, x, sparsity, context), expected)
    assert VALUE_METHODS[name].kept(HEAD_DIM, sparsity) == kept / 32


@pytest.mark.parametrize("methods", [KEY_METHODS, VALUE_METHODS])
def test_think_keeps_whole_channels_of_the_tokens_there_are(methods):
    x, context = entries_and_context()
    seen = np.where(np.asarray(context.valid)[:, None, :, None], x, 0)
    weight = (np.asarray(context.queries) ** 2).sum(axis=2) if methods is KEY_METHODS else 1
    channels = top((seen**2).sum(axis=2) * weight, 12, axis=-1)
    expected = np.broadcast_to(channels[:, :, None], x.shape)
    np.testing.assert_array_equal(mask_by(methods, "think", x, 0.7, context), expected)


@pytest.mark.parametrize("methods", [KEY_METHODS, VALUE_METHODS])
def test_two_of_four(methods):
    x, context = entries_and_context()
    expected = top(np.abs(x).reshape(*x.shape[:-1], -1, 4), 2, axis=-1).reshape(x.shape)
    np.testing.assert_array_equal(mask_by(methods, "2:4", x, 0.5, context), expected)


@pytest.mark.parametrize("methods", [KEY_METHODS, VALUE_METHODS])
def test_masks_keep_what_their_method_says(methods):
    x, context = entries_and_context()
    for name, method in methods.items():
        sparsity = method.only or 0.7
        mask = mask_by(methods, name, x, sparsity, context)
        assert mask.mean() == pytest.approx(method.kept(HEAD_DIM, sparsity))
        counts = mask.sum(axis=-1)
        assert counts.max() <= method.slots(HEAD_DIM, sparsity)
        assert (counts == counts.flat[0]).all() == method.equal_rows
