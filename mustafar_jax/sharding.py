"""Which axis of a mesh each logical axis is split over: of weights, of caches, of what passes between them.

Everything here is by JAX's own sharding. A cache holds a `CacheSharding`; its parts are computed under `jax.shard_map`
(`cache/devices.py`), weights and activations are left to the compiler.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

AXES: Mapping[str, str] = {
    "batch": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "context": "context",
}
"""The mesh axis of each logical axis. The logical axes that are not here are whole on every device."""

MESH_AXES = ("data", "tensor", "context")
"""The mesh axes, as meshes are made of them: the devices of a context axis are nearest to each other."""


@dataclasses.dataclass(frozen=True)
class CacheSharding:
    """How a cache is spread over the devices of a mesh. Hashable: static under `jax.jit`.

    Attributes:
        mesh: the devices. Where `jax.set_mesh` names the same with axes of another kind, these are meant.
        batch: the mesh axis that sequences are split over; None holds all of them on every device, as below.
        kv_heads: that of the KV heads and their query heads. Where there are fewer KV heads than devices, each is held
            by several devices, and its query heads are split over these.
        context: that of the tokens. They are dealt round in groups; the dense tail is whole on every device.
        repeats: devices that hold one KV head; `LayerCache.init` finds it.
    """

    mesh: Mesh | AbstractMesh
    batch: str | None = None
    kv_heads: str | None = None
    context: str | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        given = [axis for axis in (self.batch, self.kv_heads, self.context) if axis is not None]
        if absent := [axis for axis in given if axis not in self.mesh.axis_names]:
            raise ValueError(f"mesh has the axes {self.mesh.axis_names}; it has no {', '.join(map(repr, absent))}")
        if len(set(given)) < len(given):
            raise ValueError(f"batch, kv_heads and context are split over {given}; wanted an axis of its own for each")

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh) -> Self:
        """That of a mesh with some of the axes of `AXES`; ValueError for a mesh with others."""
        check_axes(mesh)
        named: dict[str, Any] = {
            name: AXES[name] for name in ("batch", "kv_heads", "context") if AXES[name] in mesh.axis_names
        }
        return cls(mesh, **named)

    def size(self, name: str) -> int:
        """Devices along the axis of `batch`, `kv_heads` or `context`."""
        axis = getattr(self, name)
        return 1 if axis is None else self.mesh.shape[axis]

    def spec(self, *names: str | None) -> PartitionSpec:
        """The spec of an array whose axes are called "batch", "kv_heads", "context", or None."""
        return PartitionSpec(*(None if name is None else getattr(self, name) for name in names))

    @property
    def is_local(self) -> bool:
        """Whether what is traced is one device's part, as under `jax.shard_map`."""
        used = {axis for axis in (self.batch, self.kv_heads, self.context) if axis is not None}
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        if used & manual and not used <= manual:
            raise ValueError(
                f"a cache spread over the mesh axes {sorted(used)} is used where only {sorted(manual)} are manual"
            )
        return bool(used & manual)

    def for_heads(self, num_kv_heads: int) -> "CacheSharding":
        """The same for so many KV heads; ValueError where they cannot be split."""
        devices = self.size("kv_heads")
        if num_kv_heads % devices == 0:
            return dataclasses.replace(self, repeats=1)
        if devices % num_kv_heads:
            raise ValueError(
                f"mesh axis {self.kv_heads!r} has {devices} devices, and there are {num_kv_heads} KV heads; "
                f"wanted one to be a multiple of the other"
            )
        return dataclasses.replace(self, repeats=devices // num_kv_heads)


def check_axes(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError for a mesh with an axis that nothing is split over."""
    if unknown := [axis for axis in mesh.axis_names if axis not in MESH_AXES]:
        raise ValueError(f"mesh has the axis {', '.join(map(repr, unknown))}; wanted none but {', '.join(MESH_AXES)}")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, or of those that are given.

    Args:
        sizes: devices along some of the axes of `MESH_AXES`; 1 along the others.
        devices: all that jax has, if None.

    Raises:
        ValueError: an unknown axis, a size below 1, sizes whose product is not the number of devices.
    """
    if unknown := [axis for axis in sizes if axis not in MESH_AXES]:
        raise ValueError(f"mesh axis {', '.join(map(repr, unknown))} is unknown; wanted some of {', '.join(MESH_AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    told = ",".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if min(shape) < 1:
        raise ValueError(f"mesh {told} has a size below 1")
    count = len(jax.devices() if devices is None else devices)
    if math.prod(shape) != count:
        raise ValueError(f"mesh {told} is of {math.prod(shape)} devices; there are {count}")
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=kinds, devices=devices)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these sizes, as `make_mesh` has it, of devices that need not be there."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis, of text such as "data=2,tensor=4"; ValueError for any other."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if not (equals and axis and size.isdecimal() and int(size) >= 1):
            raise ValueError(f"mesh {text!r}: {part!r} is not of the form axis=size, as in data=2,tensor=4")
        if axis not in MESH_AXES:
            raise ValueError(f"mesh {text!r}: axis {axis!r} is unknown; wanted some of {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh {text!r} names {axis!r} twice")
        sizes[axis] = int(size)
    return sizes


def weight_spec(names: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How a parameter with these logical axes is split: along an axis that the mesh divides, else not at all."""

    def axis_of(name: str, size: int) -> str | None:
        axis = AXES.get(name)
        return axis if axis in mesh.axis_names and size % mesh.shape[axis] == 0 else None

    return PartitionSpec(*map(axis_of, names, shape))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays lie on, with axes that are all Auto; None where it is one device, or has other axes."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            mesh = sharding.mesh
            return as_auto(mesh) if mesh.size > 1 and set(mesh.axis_names) <= set(MESH_AXES) else None
    return None


def is_auto(mesh: Mesh | AbstractMesh) -> bool:
    """Whether the compiler lays out arrays along all axes of a mesh."""
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def as_auto(mesh: Any) -> Any:
    """The same mesh with axes that are all Auto."""
    if is_auto(mesh):
        return mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)


def in_force(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh as `jax.set_mesh` has it where that is the same but for the kinds of its axes, else itself."""
    current = jax.sharding.get_abstract_mesh()
    same = current.axis_names == mesh.axis_names and current.axis_sizes == mesh.axis_sizes
    return current if same else mesh


def placed(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> NamedSharding | PartitionSpec:
    """A spec as `jax.jit` takes it: of the mesh that is in force by itself, where that is the same."""
    return NamedSharding(mesh, spec) if in_force(mesh) is mesh else spec


def varying_as(tree: T, *others: Any) -> T:
    """A tree whose arrays are of the type of others under `jax.shard_map`: they may differ along as many mesh axes.

    What a loop begins with must be of the type that it ends with. Elsewhere nothing happens.
    """
    axes = frozenset[str]().union(*(varying(leaf) for leaf in jax.tree.leaves(others)))

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    cast_all: T = jax.tree.map(cast, tree) if axes else tree
    return cast_all


def varying(array: Any) -> frozenset[str]:
    """The mesh axes along which an array may differ, as its type under `jax.shard_map` has them."""
    if not isinstance(array, jax.Array):
        return frozenset()
    kind = jax.typeof(array)
    axes: Any = getattr(kind, "vma", None)  # jax has had two names for it
    if axes is None:
        axes = getattr(getattr(kind, "manual_axis_type", None), "varying", ())
    return frozenset(axes)


def outputs_as(shapes: Any, *operands: jax.Array) -> Any:
    """Shapes of a kernel's outputs, a tree, of the type that its operands make them: see `varying_as`."""
    axes = frozenset[str]().union(*map(varying, operands))
    if not axes:
        return shapes
    if hasattr(jax.sharding, "ManualAxisType"):
        of_type: dict[str, Any] = {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}
    else:
        of_type = {"vma": axes}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, **of_type), shapes)


__all__ = ["AXES", "MESH_AXES", "CacheSharding", "make_mesh", "parse_mesh"]
