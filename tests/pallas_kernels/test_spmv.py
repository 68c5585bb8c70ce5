"""The sparse products' kernels against the XLA functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.pallas_kernels import spmv
from mustafar_jax.pallas_kernels.launch import DecodeParams
from tests.helpers import bits, rms_error_ratio
from tests.pallas_kernels.data import float32, implementations, rows_of
from tests.pallas_kernels.lowering import lower_for_cuda
from tests.pallas_kernels.test_decode_attention import specs

CASES = [  # kv heads, query heads per KV head, rows, head_dim, dtype, mask
    (2, 3, 1, 128, jnp.bfloat16, "magnitude"),
    (1, 20, 63, 64, jnp.float16, "unequal"),
    (1, 1, 300, 64, jnp.bfloat16, "skewed"),
]


@pytest.mark.parametrize("interpret", implementations(pytest))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(getattr(x, "__name__", str(x)) for x in case))
def test_products_agree_with_dense_ones(case, interpret):
    kv_heads, group, rows, head_dim, dtype, kind = case
    rng = np.random.default_rng(5)
    packed, dense = rows_of(rng, (1, kv_heads, rows, head_dim), dtype, 0.7, kind)
    query = jnp.asarray(rng.standard_normal((1, kv_heads, group, head_dim)), dtype)
    weights = jnp.asarray(rng.random((1, kv_heads, group, dense.shape[2])), dtype)

    @jax.jit
    def products(query, weights, packed):
        params = DecodeParams(2 if rows > 128 else 1)
        sums = spmv.value_spmv(weights, packed, params=params, interpret=interpret)
        return spmv.key_spmv(query, packed, interpret=interpret), sums

    with jax.default_matmul_precision("highest"):
        wanted_scores = jnp.einsum("bkgh,bksh->bkgs", *float32(query, dense))
        wanted_sums = jnp.einsum("bkgs,bksh->bkgh", *float32(weights, dense))
    scores, sums = products(query, weights, packed)
    assert rms_error_ratio(scores, wanted_scores) < 1e-5
    assert rms_error_ratio(sums, wanted_sums) < 1e-5
    for one, other in zip((scores, sums), products(query, weights, packed), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("sizes", [(2, 2, 4, 4096, 128, 40, 40), (1, 1, 40, 160, 64, 20, 20)])
def test_lowers_for_cuda(sizes):
    query, packed, _ = specs(*sizes, jnp.bfloat16)
    assert "triton" in lower_for_cuda(spmv.key_spmv, query, packed)
    weights = jax.ShapeDtypeStruct((*query.shape[:3], sizes[3]), jnp.bfloat16)
    assert "triton" in lower_for_cuda(spmv.value_spmv, weights, packed)
