"""Caches on meshes of every kind of axis, and under `jax.shard_map` by hand; a program of its own.

python -m tests.mustafar_jax.meshes '[["Explicit", "by hand"], ...]'
"""

import contextlib
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mustafar_jax as mj
from mustafar_jax.cache import LayerCache
from mustafar_jax.sharding import CacheSharding
from tests.helpers import rope_frequencies

BATCH, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 8, 4, 32, 100
LENGTHS = np.array([100, 77, 98, 34], np.int32)
CONFIG = mj.CompressionConfig.recommended(0.5, 0.7, residual_length=0, sink_tokens=3)
QUERY, KEY, VALUE = (
    np.random.default_rng(seed).standard_normal((BATCH, 122, heads, HEAD_DIM), dtype=np.float32)
    for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
)
PER_HEAD = PartitionSpec("data", None, "tensor")

empty = functools.partial(
    LayerCache.init, CONFIG, batch=BATCH, capacity=192, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32,
    inv_freq=rope_frequencies(HEAD_DIM),
)  # fmt: skip


def work(cache: LayerCache, query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
    """A prompt, a turn, a token both ways."""
    prompt, end = slice(0, LENGTH), LENGTH + 20
    first = mj.prefill_attention(query[:, prompt], key[:, prompt], value[:, prompt], lengths)
    first = jnp.where((jnp.arange(LENGTH)[None] < lengths[:, None])[..., None, None], first, 0)
    cache = mj.prefill(cache, key[:, prompt], value[:, prompt], lengths, query=query[:, prompt])
    turn = slice(LENGTH, end)
    second, cache = mj.attend(cache, query[:, turn], key[:, turn], value[:, turn])
    third, cache = mj.attend(cache, query[:, end : end + 1], key[:, end : end + 1], value[:, end : end + 1])
    cache = mj.append(cache, key[:, end + 1], value[:, end + 1], query=query[:, end + 1])
    return first, second, third, mj.decode_attention(query[:, end + 1], cache)[:, None], cache


def on_mesh(mesh: Mesh, how: str) -> Any:
    """What `work` gives on a mesh."""

    def put(x: Any, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec))

    arrays = *(put(x, PER_HEAD) for x in (QUERY, KEY, VALUE)), put(LENGTHS, PartitionSpec("data"))
    by_types = CacheSharding(mesh, batch="data", kv_heads="tensor")
    if how == "made by its device":
        return jax.jit(work)(empty(sharding=mesh), *arrays)
    if how == "without jit":
        return work(empty(sharding=mesh), *arrays)
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        one = empty()
    specs = one.partition_specs(by_types)
    if how == "by types":  # the cache knows of no mesh
        return jax.jit(work)(jax.tree.map(put, one, specs), *arrays)
    cache = empty(sharding=mesh) if how == "by hand" else jax.tree.map(put, one, specs)
    specs = cache.partition_specs() if how == "by hand" else specs
    inputs, outputs = (specs, PER_HEAD, PER_HEAD, PER_HEAD, PartitionSpec("data")), (*[PER_HEAD] * 4, specs)
    part = jax.shard_map(work, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=True)
    return jax.jit(part)(cache, *arrays)


def main() -> None:
    """Print the largest error of each case, as JSON."""
    jax.config.update("jax_num_cpu_devices", 8)
    expected, errors = jax.jit(work)(empty(), QUERY, KEY, VALUE, LENGTHS), []
    for kind, how, is_set in json.loads(sys.argv[1]):
        mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "context"), axis_types=(AxisType[kind],) * 3)
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            found = on_mesh(mesh, how)
        pairs = zip(expected[:4], found[:4], strict=True)
        errors.append(max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs))
    sys.stdout.write(json.dumps(errors))


if __name__ == "__main__":
    main()
