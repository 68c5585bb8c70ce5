"""Generation on a mesh: the model's, over which caches are spread, within whatever mesh of the caller's.

The compiler lays out what it computes outside of caches, whatever kind the axes of the caller's mesh are.
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.sharding import CacheSharding, as_auto, check_axes, is_auto, mesh_of

Tree = TypeVar("Tree")
T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


@contextlib.contextmanager
def automatic() -> Iterator[None]:
    """The caller's mesh, if `jax.set_mesh` names one, with axes that are all Auto."""
    if is_auto(jax.sharding.get_abstract_mesh()):
        yield
        return
    with jax.set_mesh(as_auto(jax.sharding.get_mesh())):
        yield


def each_automatic(steps: Generator[T, S | None, R]) -> Generator[T, S | None, R]:
    """The steps of a generator, each within `automatic`; between them the caller's mesh is in force."""
    told: S | None = None
    while True:
        try:
            with automatic():
                step = steps.send(told)
        except StopIteration as end:
            return to_caller(end.value)
        told = yield step


def to_auto(tree: Tree) -> Tree:
    """The tree, with arrays on Explicit axes of a mesh as they are on Auto ones: nothing is moved."""

    def mesh_of(leaf: Any) -> Mesh | None:
        """The mesh of an array on Explicit axes."""
        sharding = getattr(leaf, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        return mesh if isinstance(mesh, Mesh) and not is_auto(mesh) else None

    def placed(leaf: Any) -> Any:
        if (mesh := mesh_of(leaf)) is None:
            return leaf
        spec = PartitionSpec(*leaf.sharding.spec[: leaf.ndim])  # a key's has the axes of its data
        return jax.device_put(leaf, NamedSharding(as_auto(mesh), spec))

    def of_cache(node: Any) -> Any:
        if not _is_cache(node) or node.sharding is None:
            return node
        return dataclasses.replace(node, sharding=dataclasses.replace(node.sharding, mesh=as_auto(node.sharding.mesh)))

    moved = jax.tree.map(placed, tree) if any(map(mesh_of, jax.tree.leaves(tree))) else tree
    return jax.tree.map(of_cache, moved, is_leaf=_is_cache)


def to_caller(tree: Tree) -> Tree:
    """Results as the caller's mesh can use them: whole on each of its devices, where its axes are Explicit.

    Caches stay laid out as they are, which is how a later call takes them.
    """
    if is_auto(jax.sharding.get_abstract_mesh()):
        return tree
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    return jax.tree.map(lambda node: node if _is_cache(node) else jax.device_put(node, whole), tree, is_leaf=_is_cache)


def _is_cache(node: Any) -> bool:
    return isinstance(node, LayerCache)


def check_mesh(model: Any, mesh: Any) -> CacheSharding | None:
    """How caches are to be spread over the mesh that is named, or that of the model's weights; None if on one device.

    Raises ValueError for a mesh that is not that of the weights, TypeError for what is no mesh.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh is of type {type(mesh).__name__}; wanted a jax.sharding.Mesh")
    of_weights = mesh_of(model)
    if mesh is not None and mesh.size > 1:
        check_axes(mesh)
        if as_auto(mesh) != of_weights:
            lie = "on no mesh with these axes" if of_weights is None else f"on {of_weights.shape}"
            raise ValueError(f"mesh={dict(mesh.shape)}, but the weights lie {lie}: load them with models.load(mesh=)")
    return None if of_weights is None else CacheSharding.of(of_weights)


def fetch(tree: Any, sharding: CacheSharding | None) -> Any:
    """What arrays hold, as numpy has it, also where devices of other processes hold parts of them."""
    return jax.device_get(everywhere(tree, sharding))


def everywhere(tree: Tree, sharding: CacheSharding | None) -> Tree:
    """Arrays whole on each device, so that each process can fetch them; as they are where there is one process."""
    if sharding is None or jax.process_count() == 1:
        return tree
    whole: Tree = jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(tree)
    return whole


def new_caches(
    model: Any, config: CompressionConfig, batch: int, capacity: int, sharding: CacheSharding | None
) -> tuple[LayerCache, ...]:
    """A model's empty caches; one that is on no mesh need not know of shardings."""
    options: dict[str, Any] = {"batch": batch, "capacity": capacity}
    if sharding is not None:
        options["sharding"] = sharding
    made: tuple[LayerCache, ...] = model.init_cache(config, **options)
    return made
