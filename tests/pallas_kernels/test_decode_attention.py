"""Decode attention's kernel against attention on the pruned tensors in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax import attention
from mustafar_jax.pallas_kernels import decode_attention as kernels
from mustafar_jax.pallas_kernels.launch import DecodeParams
from mustafar_jax.pallas_kernels.rows import Mean, Packed, Tail
from mustafar_jax.rope import rotate
from tests.helpers import bits, rms_error_ratio, rope_frequencies
from tests.pallas_kernels.data import TOLERANCE, attend, implementations, merge_splits, poison, rows_of
from tests.pallas_kernels.lowering import lower_for_cuda

BF16, F16 = jnp.bfloat16, jnp.float16


def run(query, key, value, first, last, *, splits=2, interpret, mean=None, times=1):
    first, last = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)
    params = DecodeParams(splits)

    @jax.jit
    def call(*args):
        scale = query.shape[-1] ** -0.5
        parts = kernels.attend_rows(*args, scale=scale, mean=mean, params=params, interpret=interpret)
        return [x.reshape(*query.shape[:3], *x.shape[2:]) for x in merge_splits(*parts)]

    results = [call(query, key, value, first, last) for _ in range(times)]
    return results[0] if times == 1 else results


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
    np.testing.assert_allclose(np.asarray(m)[seen], np.asarray(wanted_m)[seen], rtol=1e-4, atol=1e-4)


# (batch, kv heads, query heads per KV head, rows, head_dim, k_sparsity, v_sparsity, dtype, mask)
CASES = [
    (2, 1, 1, 160, 128, 0.7, 0.7, BF16, "magnitude"),
    (1, 2, 4, 288, 64, 0.7, 0.5, F16, "magnitude"),
    (1, 1, 3, 96, 128, 0.7, 0.9, BF16, "skewed"),
    (1, 1, 16, 160, 64, 0.5, 0.5, F16, "unequal"),
    (1, 1, 2, 128, 128, 0, 0.5, F16, "magnitude"),
    (1, 1, 1, 160, 64, 0.5, 0, BF16, "magnitude"),
]


@pytest.mark.parametrize("interpret", implementations(pytest))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(getattr(x, "__name__", str(x)) for x in case))
def test_agrees_with_dense_attention(case, interpret):
    batch, kv_heads, group, rows, head_dim, k_sparsity, v_sparsity, dtype, kind = case
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.standard_normal((batch, kv_heads, group, head_dim)), dtype)
    shape = (batch, kv_heads, rows, head_dim)
    key, dense_key = rows_of(rng, shape, dtype, k_sparsity, kind)
    value, dense_value = rows_of(rng, shape, dtype, v_sparsity, kind)
    first, last = jnp.zeros(batch, jnp.int32), jnp.full(batch, rows, jnp.int32)
    actual, again = run(query, key, value, first, last, interpret=interpret, times=2)
    check(actual, attend(query, dense_key, dense_value, first, last, head_dim**-0.5), dtype)
    for one, other in zip(actual, again, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("interpret", implementations(pytest))
@pytest.mark.parametrize("sparsities", [(0.7, 0.7), (0, 0.5), (0.5, 0)])
def test_rows_outside_the_range_have_no_effect(sparsities, interpret):
    rng = np.random.default_rng(2)
    first, last = np.array([0, 0, 130, 40]), np.array([0, 63, 200, 41])
    query = jnp.asarray(rng.standard_normal((4, 1, 2, 64)), BF16)
    (key, dense_key), (value, dense_value) = (rows_of(rng, (4, 1, 288, 64), BF16, s) for s in sparsities)
    row = np.arange(288)
    outside = (row < first[:, None]) | (row >= last[:, None])
    key, value = poison(key, outside), poison(value, outside)
    actual = run(query, key, value, first, last, splits=3, interpret=interpret)
    expected = attend(query, dense_key, dense_value, jnp.asarray(first), jnp.asarray(last), 64**-0.5)
    check(actual, expected, BF16)


@pytest.mark.parametrize("interpret", implementations(pytest))
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, F16), (128, BF16)])
def test_a_mean_stands_for_what_keys_do_not_hold(head_dim, dtype, interpret):
    rng = np.random.default_rng(3)
    shape = (1, 2, 288, head_dim)
    query = jnp.asarray(rng.standard_normal((1, 2, 2, head_dim)), dtype)
    (key, dense_key), (value, dense_value) = (rows_of(rng, shape, dtype, 0.5) for _ in range(2))
    mean = jnp.asarray(rng.standard_normal((1, 2, head_dim)), jnp.float32)
    inv_freq = jnp.asarray(rope_frequencies(head_dim))
    rotated = rotate(mean[:, :, None], 4 + jnp.arange(288), inv_freq)
    held = mj.bitmap.held(mj.BitmapArray(*key, jnp.zeros(2, bool), 288))
    whole = jnp.where(held, dense_key, rotated.astype(dtype))  # as a tile holds it
    first, last = jnp.array([0]), jnp.array([270])
    actual = run(query, key, value, first, last, mean=Mean(mean, inv_freq, 4), interpret=interpret)
    check(actual, attend(query, whole, dense_value, first, last, head_dim**-0.5), dtype)


CACHES = {  # config, capacity, lengths, window
    "centred": (mj.CompressionConfig.recommended(0.7, 0.5), 256, [250, 90], None),
    "window": (mj.CompressionConfig.recommended(0.7, 0.5), 256, [250, 90], 50),
    "long tail": (mj.CompressionConfig(0.5, 0.7, residual_length=100, group=64, sink_tokens=3), 384, [301, 167], 250),
    "1000 tokens": (mj.CompressionConfig(0.7, 0.7, group=128), 1000, [1000, 63], None),
    "dense keys": (mj.CompressionConfig.recommended(0, 0.7), 160, [160, 1], None),
    "too short to pack": (mj.CompressionConfig(), 40, [40, 0], None),
}


@pytest.mark.parametrize("interpret", implementations(pytest))
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
    monkeypatch.setitem(
        attention._PACKED, "triton", functools.partial(attention._attend_packed_triton, interpret=interpret)
    )
    actual, expected = (
        mj.decode_attention(query, cache, sliding_window=window, implementation=name) for name in ("triton", "xla")
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

    query = jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype)
    return query, rows_spec(k_slots), rows_spec(v_slots)


def call(query, key, value, *, mean=False, window=None):
    """Decode attention on rows of any shape; traced, not run."""
    batch, kv_heads, _, head_dim = query.shape
    zeros = jnp.zeros((batch, kv_heads, 68, head_dim), query.dtype)
    rotated = Mean(jnp.zeros((batch, kv_heads, head_dim)), jnp.ones(head_dim // 2), 4) if mean else None
    lengths = jnp.zeros(batch, jnp.int32)
    return kernels.decode_attention(
        query, key, value, Tail(zeros, zeros, 4), lengths, lengths, scale=0.1, mean=rotated, window=window
    )


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 2, 1, 4096, 128, 40, 40, BF16),
        (1, 2, 4, 1024, 128, 64, 40, F16),
        (1, 1, 16, 160, 64, 20, 32, BF16),
        (1, 1, 7, 160, 64, 20, 0, F16),
        (1, 1, 7, 160, 128, 0, 36, BF16),
        (1, 1, 1, 32, 128, 4, 4, BF16),
    ],
)
def test_lowers_for_cuda(sizes, mean):
    assert "triton" in lower_for_cuda(functools.partial(call, mean=mean, window=90 if mean else None), *specs(*sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1, 64, 128, 40, 40, jnp.float32), "float32"),
        ((1, 1, 1, 64, 96, 40, 40, BF16), "head_dim=96"),
        ((1, 1, 17, 64, 128, 40, 40, BF16), "16 query heads"),
    ],
)
def test_says_what_it_cannot_run(sizes, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, *specs(*sizes))


def test_refuses_to_lower_for_the_cpu():
    traced = jax.jit(call).trace(*specs(1, 1, 1, 64, 128, 40, 40, BF16))
    with pytest.raises(NotImplementedError, match="CUDA"):
        traced.lower(lowering_platforms=("cpu",))


def test_a_sequence_of_names_passes_over_what_needs_a_gpu():
    cache = mj.LayerCache.init(mj.CompressionConfig(), batch=1, capacity=96, num_kv_heads=1, head_dim=64, dtype=F16)
    query = jnp.ones((1, 1, 64), F16)
    out = mj.decode_attention(query, cache, implementation=("triton", "xla"))
    np.testing.assert_array_equal(out, jnp.zeros_like(query))
