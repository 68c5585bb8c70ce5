"""What a scan over layers costs a decode step, whose caches are then stacked.

`python -m benchmarks.stacked` prints, for dense and packed caches, the temporaries of the compiled step and its time:
with caches of their own for each layer, unrolled; with stacked ones that the scan carries, a layer's cut out and
written back; and with stacked ones that are the scan's inputs and outputs.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import mustafar_jax as mj

CONFIGS = {
    "dense": mj.CompressionConfig.preset("dense"),
    "recommended 0.7": mj.CompressionConfig.recommended(0.7, 0.7),
    "fast": mj.CompressionConfig.preset("fast"),
}
STEPS = 20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the caches, which are filled but for a few tokens, and of the queries."""

    layers: int = 8
    batch: int = 2
    capacity: int = 4096
    num_kv_heads: int = 2
    num_heads: int = 4
    head_dim: int = 64


def unrolled(query: Array, key: Array, caches: Any) -> tuple[Array, Any]:
    """Caches in a tuple."""
    new = []
    for cache in caches:
        query, cache = mj.attend(cache, query, key, key)
        new.append(cache)
    return query, tuple(new)


def carried(query: Array, key: Array, caches: Any) -> tuple[Array, Any]:
    """Stacked caches as a part of the carry."""

    def layer(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], None]:
        query, stacked = carry
        cache = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)
        query, cache = mj.attend(cache, query, key, key)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        return (query, jax.tree.map(put, stacked, cache)), None

    return lax.scan(layer, (query, caches), jnp.arange(caches.lengths.shape[0]))[0]


def scanned(query: Array, key: Array, caches: Any) -> tuple[Array, Any]:
    """Stacked caches as inputs and outputs."""

    def layer(query: Array, cache: mj.LayerCache) -> tuple[Array, mj.LayerCache]:
        return mj.attend(cache, query, key, key)

    return lax.scan(layer, query, caches)


WAYS: dict[str, Callable[[Array, Array, Any], tuple[Array, Any]]] = {
    "unrolled": unrolled,
    "carried": carried,
    "inputs and outputs": scanned,
}


def compiled_step(way: str, query: Array, key: Array, cache: mj.LayerCache, layers: int, **options: Any) -> Any:
    """The compiled step of so many layers, and the caches for it, all of them copies of one."""
    if way == "unrolled":
        caches: Any = tuple(jax.tree.map(jnp.copy, cache) for _ in range(layers))
    else:
        caches = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], layers, axis=0), cache)
    return jax.jit(WAYS[way], donate_argnums=2).lower(query, key, caches).compile(**options), caches


def filled(config: mj.CompressionConfig, sizes: Sizes) -> tuple[Array, Array, mj.LayerCache]:
    """A query and a key of one token, and a cache that has room for some."""
    shape: dict[str, Any] = {"batch": sizes.batch, "capacity": sizes.capacity, "num_kv_heads": sizes.num_kv_heads}
    inv_freq = 10000.0 ** (-np.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    cache = mj.LayerCache.init(
        config, **shape, head_dim=sizes.head_dim, dtype=jnp.bfloat16, inv_freq=inv_freq, num_heads=sizes.num_heads
    )
    query, key = (
        jax.random.normal(
            jax.random.key(0), (sizes.batch, sizes.capacity - STEPS - 1, heads, sizes.head_dim), jnp.bfloat16
        )
        for heads in (sizes.num_heads, sizes.num_kv_heads)
    )
    return query[:, :1], key[:, :1], jax.jit(mj.prefill)(cache, key, key, query=query)


def main() -> None:
    """A line for each way and config."""
    sizes = Sizes()
    print(f"{sizes} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, config in CONFIGS.items():
        query, key, cache = filled(config, sizes)
        print(f"{name}: {cache.nbytes / 1e6:.2f} MB a layer")
        for way in WAYS:
            step, caches = compiled_step(way, query, key, cache, sizes.layers)
            times = []
            for _ in range(STEPS):
                start = time.perf_counter()
                _, caches = jax.block_until_ready(step(query, key, caches))
                times.append(time.perf_counter() - start)
            temporary = step.memory_analysis().temp_size_in_bytes / 1e6
            print(f"  {way:20} {temporary:8.2f} MB of temporaries {1e3 * min(times):8.2f} ms, the fastest of {STEPS}")


if __name__ == "__main__":
    main()
