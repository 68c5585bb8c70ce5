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
from mustafar_jax.pallas_kernels.rows import Packed
from mustafar_jax.rope import rotate
from tests.helpers import bits, rms_error_ratio, rope_frequencies
from tests.pallas_kernels.data import TOLERANCE, attend, implementations, poison, rows_of
from tests.pallas_kernels.lowering import lower_for_cuda

BF16, F16 = jnp.bfloat16, jnp.float16


def run(query, key, value, first, last, *, splits=2, interpret, mean=None, times=1):
    first, last = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)
    call = functools.partial(
        kernels.decode_attention,
        scale=query.shape[-1] ** -0.5,
        mean=mean,
        params=DecodeParams(splits),
        interpret=interpret,
    )
    compiled = jax.jit(call)
    results = [compiled(query, key, value, first, last) for _ in range(times)]
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
def test_adds_the_mean_back(interpret):
    rng = np.random.default_rng(3)
    query = jnp.asarray(rng.standard_normal((1, 2, 2, 64)), F16)
    (key, dense_key), (value, dense_value) = (rows_of(rng, (1, 2, 288, 64), F16, 0.5) for _ in range(2))
    mean = jnp.asarray(rng.standard_normal((1, 2, 64)), jnp.float32)
    inv_freq = jnp.asarray(rope_frequencies(64))
    whole = dense_key.astype(jnp.float32) + rotate(mean[:, :, None], 4 + jnp.arange(288), inv_freq)
    first, last = jnp.array([0]), jnp.array([288])
    actual = run(query, key, value, first, last, mean=kernels.Mean(mean, inv_freq, 4), interpret=interpret)
    check(actual, attend(query, whole, dense_value, first, last, 64**-0.5), F16)


@pytest.mark.parametrize("interpret", implementations(pytest))
def test_attends_a_cache_as_xla_does(interpret, monkeypatch):
    rng = np.random.default_rng(4)
    config = mj.CompressionConfig.recommended(0.7, 0.5)
    cache = mj.LayerCache.init(
        config, batch=2, capacity=256, num_kv_heads=2, head_dim=64, dtype=F16, inv_freq=rope_frequencies(64)
    )
    key, value = (jnp.asarray(rng.standard_normal((2, 250, 2, 64)), F16) for _ in range(2))
    cache = mj.prefill(cache, key, value, jnp.array([250, 90]))
    query = jnp.asarray(rng.standard_normal((2, 8, 64)), F16)
    monkeypatch.setitem(
        attention._PACKED, "triton", functools.partial(attention._attend_packed_triton, interpret=interpret)
    )
    actual, expected = (
        mj.decode_attention(query, cache, sliding_window=50, implementation=name) for name in ("triton", "xla")
    )
    assert rms_error_ratio(actual, expected) < TOLERANCE[jnp.dtype(F16)]


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
    def call(query, key, value, first, last):
        add_back = kernels.Mean(jnp.zeros((*query.shape[:2], query.shape[3])), jnp.ones(query.shape[3] // 2), 4)
        return kernels.decode_attention(query, key, value, first, last, scale=0.1, mean=add_back if mean else None)

    assert "triton" in lower_for_cuda(call, *specs(*sizes))


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
        jax.eval_shape(functools.partial(kernels.decode_attention, scale=0.1), *specs(*sizes))


def test_refuses_to_lower_for_the_cpu():
    call = jax.jit(functools.partial(kernels.decode_attention, scale=0.1))
    traced = call.trace(*specs(1, 1, 1, 64, 128, 40, 40, BF16))
    with pytest.raises(NotImplementedError, match="CUDA"):
        traced.lower(lowering_platforms=("cpu",))


def test_a_sequence_of_names_passes_over_what_needs_a_gpu():
    cache = mj.LayerCache.init(mj.CompressionConfig(), batch=1, capacity=96, num_kv_heads=1, head_dim=64, dtype=F16)
    query = jnp.ones((1, 1, 64), F16)
    out = mj.decode_attention(query, cache, implementation=("triton", "xla"))
    np.testing.assert_array_equal(out, jnp.zeros_like(query))
