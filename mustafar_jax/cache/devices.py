"""What each device computes of a cache that is spread over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mustafar_jax.cache.base import LayerCache
from mustafar_jax.sharding import CacheSharding, as_auto, in_force

Axes = tuple[str | None, ...]
"""The logical axes of an array, as `CacheSharding.spec` takes them; of the cache that comes out, CACHE."""

CACHE: Axes = ("cache",)
"""In place of an array's axes: a cache like the one that went in."""

R = TypeVar("R")


def each_device(
    run: Callable[..., R],
    cache: LayerCache,
    arrays: tuple[Any, ...],
    how: tuple[Any, ...] = (),
    *,
    axes: tuple[Axes, ...],
    results: Any,
) -> R:
    """`run(cache, *arrays, *how)`, where the cache is spread over devices on each one's part, else as it is.

    Under `jax.shard_map` of the caller's what is given is one device's part already.

    Args:
        run: a function of a module, so that it is the same object at each call.
        cache: the cache.
        arrays: what belongs to it; None for what is not there.
        how: hashable.
        axes: of each of the arrays.
        results: those of what comes out; a tuple of them for a tuple.
    """
    sharding = cache.sharding or _typed(cache)
    if sharding is None:
        return run(cache, *arrays, *how)
    if sharding.is_local:
        return _on_part(run, how, cache, *arrays)
    return _spread(cache, arrays, run=run, how=how, axes=axes, results=results, sharding=sharding)


@functools.partial(jax.jit, static_argnames=("run", "how", "axes", "results", "sharding"))
def _spread(
    cache: LayerCache,
    arrays: tuple[Any, ...],
    *,
    run: Callable[..., Any],
    how: tuple[Any, ...],
    axes: tuple[Axes, ...],
    results: Any,
    sharding: CacheSharding,
) -> Any:
    own = cache.sharding
    cache = dataclasses.replace(cache, sharding=sharding)
    of_cache = cache.partition_specs()
    typed, _ = explicit(cache.lengths)
    mesh = in_force(sharding.mesh) if typed is None else typed
    inputs = (of_cache, *(_specs(sharding, each) for each in axes))
    outputs = _specs(sharding, results, of_cache)
    part = functools.partial(_on_part, run, how)
    return _with_sharding(_shard_map(part, mesh, inputs, outputs, (cache, *arrays)), own)


def each_device_typed(
    run: Callable[..., R],
    arrays: tuple[jax.Array, ...],
    how: tuple[Any, ...],
    *,
    axes: tuple[Axes, ...],
    results: Any,
) -> R:
    """`run(*arrays, *how)`; on each device's part of them where the type of the first says how it is spread."""
    mesh, spec = explicit(arrays[0])
    if mesh is None or mesh.manual_axes:
        return run(*arrays, *how)
    split = dict(zip(axes[0], spec, strict=False))
    sharding = CacheSharding(as_auto(mesh), batch=split.get("batch"), kv_heads=split.get("kv_heads"))
    inputs = tuple(_specs(sharding, each) for each in axes)
    part = functools.partial(_with, run, how)
    return _shard_map(part, mesh, inputs, _specs(sharding, results), arrays)


def _with(run: Callable[..., R], how: tuple[Any, ...], *arrays: Any) -> R:
    return run(*arrays, *how)


def _specs(sharding: CacheSharding, axes: Any, of_cache: Any = None) -> Any:
    """Specs in place of the logical axes of arrays, or of a tuple of them."""
    if axes == CACHE:
        return of_cache
    if all(name is None or isinstance(name, str) for name in axes):
        return sharding.spec(*axes)
    return tuple(_specs(sharding, each, of_cache) for each in axes)


def _shard_map(part: Callable[..., Any], mesh: Any, inputs: Any, outputs: Any, given: tuple[Any, ...]) -> Any:
    given = _laid_out(given, inputs, mesh)
    return jax.shard_map(part, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)(*given)


def _on_part(run: Callable[..., R], how: tuple[Any, ...], cache: LayerCache, *arrays: Any) -> R:
    """Run on a device's part, whose static sizes are those of the whole."""
    structure = jax.tree.structure(cache)

    def whole(x: Any) -> Any:
        return jax.tree.unflatten(structure, jax.tree.leaves(x)) if isinstance(x, LayerCache) else x

    out = run(cache._part(), *arrays, *how)
    return tuple(map(whole, out)) if isinstance(out, tuple) else whole(out)  # type: ignore[return-value]


def _with_sharding(out: Any, sharding: CacheSharding | None) -> Any:
    def own(x: Any) -> Any:
        return dataclasses.replace(x, sharding=sharding) if isinstance(x, LayerCache) else x

    return tuple(map(own, out)) if isinstance(out, tuple) else own(out)


def _typed(cache: LayerCache) -> CacheSharding | None:
    """How a cache is spread over Explicit axes, which its arrays' types tell; None where they are on none."""
    mesh, spec = explicit(cache.lengths)
    if mesh is None or mesh.manual_axes:
        return None
    array, axis = cache._heads
    of_heads = [*explicit(array)[1], *[None] * array.ndim][: array.ndim][axis]
    return CacheSharding(as_auto(mesh), batch=spec[0] if spec else None, kv_heads=of_heads)


def explicit(array: Any) -> tuple[Any, PartitionSpec]:
    """The mesh of an array on Explicit axes, or None, and its spec."""
    sharding: Any = getattr(jax.typeof(array), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None, PartitionSpec()
    return mesh, sharding.spec


def _laid_out(given: tuple[Any, ...], specs: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
    """Arrays as `jax.shard_map` takes them: on Explicit axes it moves none itself."""
    if AxisType.Explicit not in mesh.axis_types:
        return given

    def move(spec: PartitionSpec, x: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, NamedSharding(mesh, spec)), x)

    return jax.tree.map(move, specs, given, is_leaf=lambda x: isinstance(x, PartitionSpec))
