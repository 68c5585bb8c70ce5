"""Decode attention through Mosaic GPU against attention on the pruned tensors in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax import attention
from mustafar_jax.pallas_kernels import mosaic_decode_attention as kernels
from mustafar_jax.pallas_kernels.launch import MosaicParams
from mustafar_jax.pallas_kernels.rows import Mean, Packed
from mustafar_jax.rope import rotate
from tests.helpers import bits, rms_error_ratio, rope_frequencies
from tests.pallas_kernels.data import TOLERANCE, attend, merge_splits, pack_rows, poison, rows_of
from tests.pallas_kernels.lowering import lower_for_cuda

BF16, F16 = jnp.bfloat16, jnp.float16
TWO_SPLITS = MosaicParams(splits=2, warps=4)
WHERE = [
    pytest.param(True, id="interpret"),
    pytest.param(False, marks=pytest.mark.gpu, id="device"),
]


def run(query, key, value, first, last, *, mean=None, params=TWO_SPLITS, interpret, times=1):
    """Results of the first and the last run."""
    first, last = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)

    @jax.jit
    def attend_rows(*arguments):
        options = {"scale": query.shape[-1] ** -0.5, "mean": mean, "params": params, "interpret": interpret}
        return merge_splits(*kernels.attend_rows(*arguments, **options))

    results = [jax.block_until_ready(attend_rows(query, key, value, first, last)) for _ in range(times)]
    return [[x.reshape(*query.shape[:3], *x.shape[2:]) for x in result] for result in (results[0], results[-1])]


def check(actual, expected, dtype):
    out, m, l = actual  # noqa: E741
    wanted_out, wanted_m, wanted_l = expected
    seen = np.asarray(wanted_l) > 0
    assert np.all(np.asarray(l)[~seen] == 0)
    assert np.all(np.asarray(out)[~seen] == 0)
    normalised, wanted = (
        np.asarray(o)[seen] / np.asarray(n)[seen][:, None] for o, n in ((out, l), (wanted_out, wanted_l))
    )
    assert rms_error_ratio(normalised, wanted) < TOLERANCE[jnp.dtype(dtype)]
    # m may be any score that is large enough; with l it says the same
    one, other = (np.asarray(m)[seen] + np.log(np.asarray(l)[seen]) for m, l in ((m, l), (wanted_m, wanted_l)))  # noqa: E741
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


# (batch, kv heads, query heads per KV head, rows, head_dim, k_sparsity, v_sparsity, dtype, mask)
CASES = [
    (2, 1, 1, 160, 128, 0.7, 0.7, BF16, "magnitude"),
    (1, 2, 4, 288, 64, 0.7, 0.5, F16, "magnitude"),
    (1, 1, 3, 96, 128, 0.7, 0.9, BF16, "skewed"),
    (1, 1, 16, 160, 64, 0.5, 0.5, F16, "unequal"),
    (1, 1, 8, 96, 128, 0.5, 0.7, F16, "unequal"),
    (1, 2, 2, 64, 128, 0.72, 0.96, F16, "magnitude"),
    (1, 1, 2, 96, 128, 0, 0.5, F16, "magnitude"),
    (1, 2, 1, 96, 64, 0.5, 0, BF16, "magnitude"),
]


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(getattr(x, "__name__", str(x)) for x in case))
def test_agrees_with_dense_attention(case, interpret):
    batch, kv_heads, group, rows, head_dim, k_sparsity, v_sparsity, dtype, kind = case
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.standard_normal((batch, kv_heads, group, head_dim)), dtype)
    shape = (batch, kv_heads, rows, head_dim)
    key, dense_key = rows_of(rng, shape, dtype, k_sparsity, kind)
    value, dense_value = rows_of(rng, shape, dtype, v_sparsity, kind)
    first, last = jnp.zeros(batch, jnp.int32), jnp.full(batch, rows, jnp.int32)
    # interpreted, a second run would only repeat the first
    actual, again = run(query, key, value, first, last, interpret=interpret, times=1 if interpret else 2)
    check(actual, attend(query, dense_key, dense_value, first, last, head_dim**-0.5), dtype)
    for one, other in zip(actual, again, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize(
    ("params", "sparsities"),
    [(MosaicParams(3, 8), (0.7, 0.5)), (MosaicParams(1, 4), (0, 0.5)), (MosaicParams(1, 4), (0.5, 0))],
)
def test_rows_outside_the_range_have_no_effect(params, sparsities, interpret):
    rng = np.random.default_rng(2)
    first, last = np.array([0, 0, 130, 40, 7]), np.array([0, 63, 200, 41, 7])
    query = jnp.asarray(rng.standard_normal((5, 1, 2, 64)), BF16)
    (key, dense_key), (value, dense_value) = (rows_of(rng, (5, 1, 288, 64), BF16, s) for s in sparsities)
    row = np.arange(288)
    outside = (row < first[:, None]) | (row >= last[:, None])
    actual, _ = run(
        query, poison(key, outside), poison(value, outside), first, last, params=params, interpret=interpret
    )
    expected = attend(query, dense_key, dense_value, jnp.asarray(first), jnp.asarray(last), 64**-0.5)
    check(actual, expected, BF16)


def edge_masks(rng, slots):
    """Full rows of 4 words on and beside the edges of what `Guess` takes for usual, each also turned round."""
    guess = kernels.Guess.of(slots, 4)
    outer = [guess.least - 1, guess.least, guess.most, guess.most + 1]
    pairs = [(first, max(1, guess.pair - first + more)) for first in outer for more in (-1, 0, 5)]
    masks = []
    for first, second in [*pairs, ((guess.pair + guess.most) // 2, 0), (0, slots // 4)]:
        rest = slots - first - second
        for order in (1, -1):
            counts = [first, second, rest // 2, rest - rest // 2][::order]
            masks.append(np.concatenate([rng.permutation(32) < count for count in counts]))
    return np.array(masks)


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize("slots", [40, 64])
def test_masks_on_the_edge_of_the_usual(slots, interpret):
    rng = np.random.default_rng(slots)
    # a unit goes the way that suits all of its rows, so all of a unit's rows have one mask
    masks = np.repeat(edge_masks(rng, slots), 32, axis=0)[None, None]
    shape = masks.shape
    key, value = (jnp.asarray(rng.standard_normal(shape), F16) for _ in range(2))
    query = jnp.asarray(rng.standard_normal((1, 1, 1, 128)), F16)
    (key, dense_key), (value, dense_value) = (pack_rows(x, masks) for x in (key, value))
    first, last = jnp.zeros(1, jnp.int32), jnp.full(1, shape[2], jnp.int32)
    actual, _ = run(query, key, value, first, last, interpret=interpret)
    check(actual, attend(query, dense_key, dense_value, first, last, 128**-0.5), F16)


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, F16), (128, BF16)])
def test_a_mean_stands_for_what_keys_do_not_hold(head_dim, dtype, interpret):
    rng = np.random.default_rng(3)
    shape = (1, 2, 320, head_dim)
    query = jnp.asarray(rng.standard_normal((1, 2, 2, head_dim)), dtype)
    (key, dense_key), (value, dense_value) = (rows_of(rng, shape, dtype, 0.5) for _ in range(2))
    mean = jnp.asarray(rng.standard_normal((1, 2, head_dim)), jnp.float32)
    inv_freq = jnp.asarray(rope_frequencies(head_dim))
    rotated = rotate(mean[:, :, None], 4 + jnp.arange(shape[2]), inv_freq)
    held = mj.bitmap.held(mj.BitmapArray(*key, jnp.zeros(2, bool), shape[2]))
    whole = jnp.where(held, dense_key, rotated.astype(dtype))  # as a tile holds it
    first, last = jnp.array([40]), jnp.array([310])
    params = MosaicParams(splits=1, warps=4)  # two and three units to a warp
    actual, _ = run(query, key, value, first, last, mean=Mean(mean, inv_freq, 4), params=params, interpret=interpret)
    check(actual, attend(query, whole, dense_value, first, last, head_dim**-0.5), dtype)


CACHES = {  # config, capacity, lengths, window
    "whole": (mj.CompressionConfig(0.7, 0.5), 224, [216, 90], None),
    "centred": (mj.CompressionConfig.recommended(0.5, 0.5), 128, [128, 70], None),
    "dense keys": (mj.CompressionConfig.recommended(0, 0.7), 96, [96, 1], None),
    "window": (mj.CompressionConfig(0.5, 0.7, rescale_values=True, sink_tokens=3), 192, [190, 20], 100),
    "too short to pack": (mj.CompressionConfig(), 40, [40, 0], None),
}


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize("name", CACHES)
def test_attends_a_cache_as_xla_does(name, interpret, monkeypatch):
    config, capacity, lengths, window = CACHES[name]
    rng = np.random.default_rng(4)
    cache = mj.LayerCache.init(
        config, batch=2, capacity=capacity, num_kv_heads=2, head_dim=64, dtype=F16, inv_freq=rope_frequencies(64)
    )
    key, value = (jnp.asarray(rng.standard_normal((2, capacity, 2, 64)) + 1, F16) for _ in range(2))
    cache = mj.prefill(cache, key, value, jnp.array(lengths))
    query = jnp.asarray(rng.standard_normal((2, 6, 64)), F16)
    run_here = functools.partial(attention._attend_packed_mosaic_gpu, interpret=interpret)
    monkeypatch.setitem(attention._PACKED, "mosaic_gpu", run_here)
    actual, expected = (
        mj.decode_attention(query, cache, sliding_window=window, implementation=name) for name in ("mosaic_gpu", "xla")
    )
    some = np.asarray(lengths) > 0
    assert np.all(np.asarray(actual)[~some] == 0)
    assert rms_error_ratio(actual[some], expected[some]) < TOLERANCE[jnp.dtype(F16)]


def specs(batch, kv_heads, group, rows, head_dim, k_slots, v_slots, dtype):
    """Argument shapes; 0 slots: dense."""

    def rows_spec(slots):
        if slots == 0:
            return jax.ShapeDtypeStruct((batch, kv_heads, rows, head_dim), dtype)
        chunk = 8 if slots % 8 == 0 else 4
        values = (batch, kv_heads, rows // 32, slots // chunk, 32, chunk)
        bitmap = jax.ShapeDtypeStruct((batch, kv_heads, rows, head_dim // 32), jnp.uint32)
        return Packed(bitmap, jax.ShapeDtypeStruct(values, dtype))

    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    query = jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype)
    return query, rows_spec(k_slots), rows_spec(v_slots), lengths, lengths


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 2, 1, 4096, 128, 40, 40, BF16),
        (1, 2, 4, 1024, 128, 64, 40, F16),
        (1, 1, 16, 160, 64, 20, 32, BF16),
        (1, 1, 7, 160, 128, 128, 36, BF16),
        (1, 1, 1, 32, 128, 4, 4, BF16),
        (1, 1, 2, 160, 64, 20, 0, F16),
        (1, 1, 2, 160, 128, 0, 36, BF16),
    ],
)
@pytest.mark.parametrize("centred", [False, True])
def test_lowers_for_cuda(sizes, centred):
    def call(query, *arguments):
        mean = Mean(jnp.zeros((*query.shape[:2], query.shape[3])), jnp.ones(query.shape[3] // 2), 4)
        return kernels.attend_rows(query, *arguments, scale=0.1, mean=mean if centred else None)

    assert "mosaic_gpu" in lower_for_cuda(call, *specs(*sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1, 64, 128, 40, 40, jnp.float32), "float32"),
        ((1, 1, 1, 64, 96, 40, 40, BF16), "head_dim=96"),
        ((1, 1, 17, 64, 128, 40, 40, BF16), "16 query heads"),
        ((1, 1, 1, 64, 128, 0, 0, BF16), "both are dense"),
    ],
)
def test_says_what_it_cannot_run(sizes, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(kernels.attend_rows, scale=0.1), *specs(*sizes))


def test_says_when_a_block_is_too_large():
    call = functools.partial(kernels.attend_rows, scale=0.1, params=MosaicParams(1, warps=16))
    with pytest.raises(ValueError, match="fewer warps"):
        jax.eval_shape(call, *specs(1, 1, 16, 64, 128, 40, 40, BF16))


def test_refuses_to_lower_for_the_cpu():
    call = jax.jit(functools.partial(kernels.attend_rows, scale=0.1))
    traced = call.trace(*specs(1, 1, 1, 64, 128, 40, 40, BF16))
    with pytest.raises(NotImplementedError, match="CUDA"):
        traced.lower(lowering_platforms=("cpu",))
