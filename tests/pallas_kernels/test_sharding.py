"""The kernels within a mesh of 8 GPUs, lowered without one: each GPU runs them on its own part."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import mustafar_jax as mj
from tests.helpers import exhaustive, rope_frequencies
from tests.pallas_kernels.lowering import lower_for_cuda

BATCH, HEADS, KV_HEADS, HEAD_DIM = 4, 16, 8, 64
CONFIGS = {
    "published": mj.CompressionConfig(0.5, 0.5),
    "fast": mj.CompressionConfig.preset("fast"),
    "recommended": mj.CompressionConfig.recommended(0.7, 0.7),
}


def lowered(implementation, name, *, by_hand=False, **sizes):
    """The program of a step on 8 GPUs, as text."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    make = functools.partial(
        mj.LayerCache.init, CONFIGS[name], batch=BATCH, capacity=1024, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        dtype=jnp.bfloat16, inv_freq=rope_frequencies(HEAD_DIM), sharding=mesh,
    )  # fmt: skip
    shapes = jax.eval_shape(make)
    specs = shapes.partition_specs()

    def typed(shape, spec):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    of_token = shapes.sharding.spec("batch", "kv_heads", None)
    query, key = (
        typed(jax.ShapeDtypeStruct((BATCH, heads, HEAD_DIM), jnp.bfloat16), of_token) for heads in (HEADS, KV_HEADS)
    )

    def step(cache, query, key):
        cache = mj.append(cache, key, key, query=query, implementation="triton")
        return mj.decode_attention(query, cache, implementation=implementation), cache

    if by_hand:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, of_token, of_token), out_specs=(of_token, specs), check_vma=True
        )
    return lower_for_cuda(step, jax.tree.map(typed, shapes, specs), query, key)


@pytest.mark.parametrize(
    ("implementation", "name", "by_hand", "sizes"),
    [
        ("mosaic_gpu", "recommended", False, {"data": 2, "tensor": 4}),
        ("triton", "published", True, {"data": 2, "tensor": 4}),
        *exhaustive(
            ("triton", "fast", False, {"tensor": 8}),
            ("mosaic_gpu", "fast", True, {"tensor": 8}),
            ("triton", "published", False, {"tensor": 2, "context": 4}),
        ),
    ],
)
def test_kernels_are_lowered_for_each_device_of_a_mesh(implementation, name, by_hand, sizes):
    """Also within `jax.shard_map` of the caller's, with its check of what varies."""
    text = lowered(implementation, name, by_hand=by_hand, **sizes)
    batch, heads = BATCH // sizes.get("data", 1), KV_HEADS // sizes["tensor"]
    kernels = [
        line for line in text.splitlines() if re.search(r"custom_call @(__gpu\$xla.gpu.triton|mosaic_gpu)", line)
    ]
    assert len(kernels) >= 3  # packs, attends, merges
    group = HEADS // KV_HEADS
    out = rf"tensor<({batch}x{heads}|{batch * heads})x{group}x{HEAD_DIM}xbf16>"
    assert re.search(out, kernels[-1].rsplit("->", 1)[-1])  # a device's part is what the kernels are given
