"""The sparse products' kernels against the XLA functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax.backend import Operation
from mustafar_jax.pallas_kernels.triton import backend, spmv
from mustafar_jax.pallas_kernels.triton.launch import DecodeParams
from tests.helpers import bits, magnitude_mask, pack, replace_backend, rms_error_ratio
from tests.pallas_kernels.data import WHERE, float32, jit, rows_of, specs
from tests.pallas_kernels.lowering import lower_for_cuda

KINDS = ["magnitude", "unequal", "skewed"]


@pytest.mark.parametrize("interpret", WHERE)
def test_products_agree_with_dense_ones(interpret):
    rng = np.random.default_rng(5)
    length, head_dim = (100, 64) if interpret else (300, 128)
    packed, dense = rows_of(rng, (len(KINDS), 2, length, head_dim), jnp.bfloat16, 0.7, KINDS)
    query = jnp.asarray(rng.standard_normal((len(KINDS), 2, 3, head_dim)), jnp.bfloat16)
    weights = jnp.asarray(rng.random((len(KINDS), 2, 3, dense.shape[2])), jnp.bfloat16)

    def products(query, weights, packed):
        sums = spmv.value_spmv(weights, packed, params=DecodeParams(2), interpret=interpret)
        return spmv.key_spmv(query, packed, interpret=interpret), sums

    products = jit(products, interpret=interpret)
    with jax.default_matmul_precision("highest"):
        wanted_scores = jnp.einsum("bkgh,bksh->bkgs", *float32(query, dense))
        wanted_sums = jnp.einsum("bkgs,bksh->bkgh", *float32(weights, dense))
    scores, sums = products(query, weights, packed)
    assert rms_error_ratio(scores, wanted_scores) < 1e-5
    assert rms_error_ratio(sums, wanted_sums) < 1e-5
    if not interpret:
        for one, other in zip((scores, sums), products(query, weights, packed), strict=True):
            np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("interpret", WHERE)
@pytest.mark.parametrize(("product", "axis"), [(mj.key_spmv, 64), (mj.value_spmv, 63)])
def test_the_library_takes_them_with_their_gradients(product, axis, interpret, monkeypatch):
    """Any leading axes, a length that is no multiple of 32, more query heads than one product has rows."""
    multiply = functools.partial(backend.multiply, interpret=interpret)
    replace_backend(monkeypatch, "triton", multiply=Operation(multiply))
    rng = np.random.default_rng(6)
    keys = jnp.asarray(rng.standard_normal((2, 63, 64)), jnp.float16)
    packed = pack(keys, magnitude_mask(keys, 0.5), slots=32)
    heads = 20 + interpret  # a shape of its own: what is jitted by itself would share one trace
    x = jnp.asarray(rng.random((2, heads, axis)), jnp.float16)

    def value_and_gradient(name):
        call = jax.value_and_grad(lambda x: (product(x, packed, implementation=name) ** 2).sum())
        return jit(call, interpret=interpret)(x)

    for one, other in zip(value_and_gradient("triton"), value_and_gradient("xla"), strict=True):
        assert rms_error_ratio(one, other) < 1e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("product", [mj.key_spmv, mj.value_spmv])
def test_which_implementation_is_taken(product):
    keys = jnp.ones((64, 64), jnp.bfloat16)
    packed = mj.pack(keys, keys > 0)
    text = lower_for_cuda(lambda x: product(x, packed, implementation="triton"), keys)
    assert "triton" in text
    assert (product(keys, packed, implementation=("triton", "xla")) == 64).all()
    assert "triton" not in jax.jit(product).lower(keys, packed).as_text()
    with pytest.raises(NotImplementedError, match="float32 and rows of bfloat16"):
        product(keys.astype(jnp.float32), packed, implementation="triton")
    none = mj.pack(keys[:0], keys[:0] > 0)
    with pytest.raises(NotImplementedError, match="at least one row; got none"):
        product(keys if product is mj.key_spmv else keys[:, :0], none, implementation="triton")
    with pytest.raises(NotImplementedError, match="'cudnn' does not multiply with stored rows"):
        product(keys, packed, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        product(keys, packed, implementation="fast")


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
