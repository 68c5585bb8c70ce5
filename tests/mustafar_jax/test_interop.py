"""The published rule and format: against the published code's own output, and their properties on other data."""

import pathlib

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mustafar_jax import interop, key_spmv, pack, value_spmv

DATA = pathlib.Path(__file__).parents[1] / "data"
HALF_ULP = 2.0**-11  # float16 rounds to nearest: this much relative error at most

published_mask = jax.jit(interop.published_mask, static_argnums=1)
EXPORTS = {"key": interop.export_keys, "value": interop.export_values}


@pytest.fixture(scope="module", params=["mha_50", "mha_70", "gqa4_70"])
def published(request):
    """What the published code made of its inputs; see tests/data/README.md."""
    with np.load(DATA / f"published_{request.param}.npz") as file:
        return dict(file)


def decode(cache, side, length):
    """The dense [heads, S, 128] of a published cache, tile by tile as its description says."""
    dense = np.zeros((len(cache.bitmaps), length, 128), np.float16)
    head_starts = np.concatenate([[0], np.cumsum(cache.offsets[:, -1])])
    for head, tile in np.ndindex(cache.bitmaps.shape):
        bits = f"{int(cache.bitmaps[head, tile]) % 2**64:064b}"
        start = 2 * (head_starts[head] + cache.offsets[head, tile])
        places = [place for place, bit in enumerate(bits) if bit == "1"]
        block, within = divmod(tile, 128)  # both kinds have 128 tiles for each block of 64 tokens
        for rank, place in enumerate(places):
            if side == "key":
                token, channel = 64 * block + place, within
            else:
                token, channel = 64 * block + within % 64, 64 * (within // 64) + place
            dense[head, token, channel] = cache.values[start + rank]
    return dense


def as_published(published, side):
    """The packed arrays of one of the two caches."""
    return interop.PublishedCache(*(published[f"{side}_{field}"] for field in ("bitmaps", "offsets", "values")))


def pruned(published, side):
    """The whole pruned tensor [heads, S, 128], from the published code's own packed arrays."""
    return decode(as_published(published, side), side, published["scores"].shape[-1])


def grouped(x, heads):
    """[query heads, ...] -> [heads, G, ...], float32: query head i belongs to KV head i // G."""
    return x.reshape(heads, -1, *x.shape[1:]).astype(np.float32)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_rounds_to(actual, expected):
    """`actual` is `expected` before it was rounded to float16, but for the order of float32 sums."""
    order = 2.0**-20 * np.abs(actual).max()
    np.testing.assert_allclose(expected.astype(np.float32).reshape(actual.shape), actual, rtol=HALF_ULP, atol=order)


@pytest.mark.parametrize("side", ["key", "value"])
def test_published_mask_prunes_as_the_published_code(published, side):
    mask = published_mask(published[side], float(published["sparsity"]))
    assert_same_bits(published[side] * np.asarray(mask), published[f"{side}_pruned"])


@pytest.mark.parametrize("side", ["key", "value"])
def test_export_equals_the_published_arrays(published, side):
    exported = EXPORTS[side](pruned(published, side))
    assert_same_bits(exported.bitmaps, published[f"{side}_bitmaps"])
    assert_same_bits(exported.offsets, published[f"{side}_offsets"])
    assert_same_bits(exported.values, published[f"{side}_values"])


@pytest.mark.parametrize("side", ["key", "value"])
def test_published_tensors_are_exported_from_jax_arrays_with_their_negative_zeros(published, side):
    x = published[f"{side}_pruned"]
    assert np.signbit(x[x == 0]).any()
    exported = EXPORTS[side](jnp.asarray(x))
    assert_same_bits(exported.bitmaps, published[f"{side}_bitmaps"][:, :128])
    assert_same_bits(exported.offsets, published[f"{side}_offsets"][:, :129])
    np.testing.assert_array_equal(decode(exported, side, 64), x)


def test_attention_on_the_pruned_tensors_agrees_with_the_published_kernels(published):
    key, value = (pruned(published, side).astype(np.float32) for side in ("key", "value"))
    heads = len(key)
    scores = np.einsum("kgh,ksh->kgs", grouped(published["query"], heads), key)
    assert_rounds_to(scores, published["scores"])
    probabilities = jax.nn.softmax(grouped(published["scores"], heads) / np.sqrt(128), axis=-1)
    np.testing.assert_allclose(
        grouped(published["probabilities"], heads), probabilities, rtol=1.01 * HALF_ULP, atol=2.0**-25
    )
    output = np.einsum("kgs,ksh->kgh", grouped(published["probabilities"], heads), value)
    assert_rounds_to(output, published["output"])


def test_spmv_agrees_with_the_published_kernels(published):
    key, value = (jnp.asarray(pruned(published, side)) for side in ("key", "value"))
    query, probabilities = (jnp.asarray(grouped(published[name], len(key))) for name in ("query", "probabilities"))
    scores = key_spmv(query, pack(key, key != 0))
    assert_rounds_to(np.asarray(scores), published["scores"])
    output = value_spmv(probabilities, pack(value, value != 0))
    assert_rounds_to(np.asarray(output), published["output"])


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 128), (0.5, 65), (0.7, 40), (0.9, 14), (0.999, 2)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_published_mask_keeps_the_kth_smallest_too(sparsity, kept, dtype):
    signs = np.where(np.arange(128) % 3, 1, -1)
    x = jnp.asarray(np.random.default_rng(0).permutation(128) * signs, dtype)
    mask = interop.published_mask(x, sparsity)
    assert mask.sum() == kept
    np.testing.assert_array_equal(mask, jnp.abs(x) >= 128 - kept)


def kth_smallest_rule(row, sparsity):
    """The published rule for one vector, by sorting; a NaN sorts last and compares with nothing."""
    k = int(sparsity * len(row))
    magnitudes = np.abs(row)
    threshold = np.sort(magnitudes)[k - 1] if k else 0
    return magnitudes >= threshold


@given(
    bits=hnp.arrays(np.uint16, (3, 10)),
    sparsity=st.sampled_from([0.0, 0.09, 0.1, 0.29, 0.5, 0.7, 0.999]),
)
def test_published_mask_is_the_kth_smallest_rule(bits, sparsity):
    x = bits.view(np.float16)
    mask = published_mask(x, sparsity)
    np.testing.assert_array_equal(mask, np.apply_along_axis(kth_smallest_rule, -1, x, sparsity))


def test_published_mask_tells_float32_subnormals_apart():
    x = jnp.asarray(np.arange(8, dtype=np.uint32).view(np.float32))
    np.testing.assert_array_equal(interop.published_mask(x, 0.5), [0, 0, 0, 1, 1, 1, 1, 1])


@st.composite
def sparse_tensors(draw):
    """float16 [heads, S, 128] of any bits, with empty, full and mixed tiles."""
    heads, blocks = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = random.integers(0, 2**16, (heads, 64 * blocks, 128), np.uint16)
    density = random.choice([0.0, 0.1, 0.3, 1.0], size=(heads, 64 * blocks, 2))
    kept = random.random(bits.shape) < np.repeat(density, 64, axis=-1)
    return np.where(kept, bits, 0).astype(np.uint16).view(np.float16)


@pytest.mark.parametrize("side", ["key", "value"])
@given(x=sparse_tensors())
def test_exported_tensors_decode_to_themselves(side, x):
    exported = EXPORTS[side](x)
    without_negative_zeros = np.where(x == 0, np.float16(0), x)
    assert_same_bits(decode(exported, side, x.shape[1]), without_negative_zeros)
    assert exported.bitmaps.dtype == np.int64
    assert exported.offsets.dtype == np.int32
    assert exported.bitmaps.shape == (len(x), 2 * x.shape[1])
    assert (exported.offsets[:, 0] == 0).all()
    assert (exported.offsets % 4 == 0).all()  # whole multiples of 8 entries
    assert len(exported.values) == 2 * exported.offsets[:, -1].sum()
    assert np.count_nonzero(exported.values) == np.count_nonzero(x)  # the padding is zero


@pytest.mark.parametrize(("side", "tile", "bit"), [("key", 128 + 70, 60), ("value", 128 + 64 + 3, 57)])
def test_one_entry_stands_in_its_tile_and_bit(side, tile, bit):
    x = np.zeros((2, 128, 128), np.float16)
    x[1, 64 + 3, 70] = -2.5
    exported = EXPORTS[side](x)
    expected = np.zeros((2, 256), np.int64)
    expected[1, tile] = 1 << bit
    np.testing.assert_array_equal(exported.bitmaps, expected)
    np.testing.assert_array_equal(exported.offsets[1], [0] * (tile + 1) + [4] * (256 - tile))
    np.testing.assert_array_equal(exported.values, [-2.5, 0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("export", EXPORTS.values())
@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((64, 128), np.float16, ValueError, r"x has shape \(64, 128\); wanted \[heads, S, 128\]"),
        ((1, 2, 64, 128), np.float16, ValueError, r"x has shape \(1, 2, 64, 128\); wanted \[heads, S, 128\]"),
        ((2, 64, 128), np.float32, TypeError, "x has dtype float32; wanted float16"),
        ((2, 64, 128), jnp.bfloat16, TypeError, "x has dtype bfloat16; wanted float16"),
        ((2, 64, 64), np.float16, ValueError, "x has head_dim 64; wanted 128"),
        ((2, 100, 128), np.float16, ValueError, "x has S=100 tokens; wanted a multiple of 64"),
    ],
)
def test_export_refuses_what_the_format_cannot_hold(export, shape, dtype, error, message):
    with pytest.raises(error, match=message):
        export(np.zeros(shape, dtype))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_published_mask_refuses_a_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity={sparsity} must be the fraction removed, in \[0, 1\)"):
        interop.published_mask(jnp.ones(128), sparsity)


def test_published_mask_refuses_a_scalar_and_integers():
    with pytest.raises(ValueError, match=r"x has shape \(\); wanted \[\.\.\., D\]"):
        interop.published_mask(jnp.float32(1), 0.5)
    with pytest.raises(TypeError, match="x has dtype int32; wanted bfloat16, float16 or float32"):
        interop.published_mask(jnp.ones(8, jnp.int32), 0.5)
