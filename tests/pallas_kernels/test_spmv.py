"""The sparse products' kernels against the XLA functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.pallas_kernels import spmv
from mustafar_jax.pallas_kernels.launch import DecodeParams
from tests.helpers import bits, rms_error_ratio
from tests.pallas_kernels.data import WHERE, float32, jit, rows_of, specs
from tests.pallas_kernels.lowering import lower_for_cuda

CASES = {  # kv heads, query heads per KV head, rows, head_dim, dtype
    "two splits": (2, 3, 300, 128, jnp.bfloat16),
    "more than 16 query heads": (1, 20, 63, 64, jnp.float16),
}


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize("case", CASES)
def test_products_agree_with_dense_ones(case, interpret):
    kv_heads, group, rows, head_dim, dtype = CASES[case]
    rng = np.random.default_rng(5)
    kinds = ["magnitude", "unequal", "skewed"]
    packed, dense = rows_of(rng, (len(kinds), kv_heads, rows, head_dim), dtype, 0.7, kinds)
    query = jnp.asarray(rng.standard_normal((len(kinds), kv_heads, group, head_dim)), dtype)
    weights = jnp.asarray(rng.random((len(kinds), kv_heads, group, dense.shape[2])), dtype)

    def products(query, weights, packed):
        params = DecodeParams(2 if rows > 128 else 1)
        sums = spmv.value_spmv(weights, packed, params=params, interpret=interpret)
        return spmv.key_spmv(query, packed, interpret=interpret), sums

    products = jit(products, interpret=interpret)
    with jax.default_matmul_precision("highest"):
        wanted_scores = jnp.einsum("bkgh,bksh->bkgs", *float32(query, dense))
        wanted_sums = jnp.einsum("bkgs,bksh->bkgh", *float32(weights, dense))
    scores, sums = products(query, weights, packed)
    assert rms_error_ratio(scores, wanted_scores) < 1e-5
    assert rms_error_ratio(sums, wanted_sums) < 1e-5
    if interpret:
        return
    for one, other in zip((scores, sums), products(query, weights, packed), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize(
    ("group", "rows", "head_dim", "slots", "dtype"),
    [
        (4, 4096, 128, 40, jnp.bfloat16),
        (40, 160, 64, 20, jnp.float16),
        (1, 32, 128, 128, jnp.float16),
        (16, 32, 64, 4, jnp.bfloat16),
    ],
)
def test_lowers_for_cuda(group, rows, head_dim, slots, dtype):
    query, packed, _ = specs(2, 2, group, rows, head_dim, slots, slots, dtype)
    assert "triton" in lower_for_cuda(spmv.key_spmv, query, packed)
    weights = jax.ShapeDtypeStruct((*query.shape[:3], rows), dtype)
    assert "triton" in lower_for_cuda(spmv.value_spmv, weights, packed)
