"""`mustafar info`: a model's shape, what its cache costs, and how many sequences fit in a device."""

import argparse
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mustafar_jax.arguments import parse_size
from mustafar_jax.cache.base import check_rules
from mustafar_jax.cli.compression import add_compression, config_of, packed_rows
from mustafar_jax.cli.parser import MODEL, add_dtype, add_mesh
from mustafar_jax.cli.render import size, table
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import DENSE
from mustafar_jax.sharding import CacheSharding, abstract_mesh

if TYPE_CHECKING:
    from mustafar_jax.models import ModelConfig

CONTEXTS = (1024, 4096, 16384, 65536, 131072)
"""Context lengths to show, as far as the model's own reaches."""

SHAPE = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
)


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("info", help="a model's shape and its cache's costs")
    command.set_defaults(run=run)
    command.add_argument("model", help=MODEL)
    command.add_argument("--memory", type=parse_size, help="of a device, such as 80GB: how many sequences fit in it")
    add_dtype(command, "bfloat16")
    add_mesh(command)
    add_compression(command)


def run(options: argparse.Namespace) -> None:
    """Print the tables."""
    from mustafar_jax import models

    compression = config_of(options)
    config = models.load_config(options.model)
    mesh = None if options.mesh is None else models.check_mesh(abstract_mesh(options.mesh), config)
    if mesh is not None:
        check_rules(CacheSharding.of(mesh).for_heads(config.num_kv_heads), compression)
    console = Console()
    console.print(_shape_table(options.model, config))
    dtype = options.dtype or "bfloat16"
    console.print(_cost_table(config, compression, dtype))
    if options.memory is not None:
        console.print(_memory_table(config, compression, dtype, options.memory, mesh))


def _shape_table(name: str, config: "ModelConfig") -> Table:
    shape = Table(title=Text(name), show_header=False)
    for field in SHAPE:
        shape.add_row(field, str(getattr(config, field)))
    return shape


def _cost_table(config: "ModelConfig", compression: CompressionConfig, dtype: str) -> Table:
    """Bytes of one sequence's cache, all layers, at a few context lengths."""
    from mustafar_jax.models import memory

    title = f"KV cache of one sequence, {dtype}; {packed_rows(compression, config.head_dim, dtype)}"
    costs = table(title, ("context", "dense", "compressed", "of dense", "dense/token", "compressed/token"))
    for length in _contexts(config):
        dense, held = (
            sum(cache.nbytes for cache in memory.abstract_caches(config, how, length, dtype=dtype))
            for how in (DENSE, compression)
        )
        per_token = (size(dense / length), size(held / length))
        costs.add_row(f"{length:,}", size(dense), size(held), f"{held / dense:.1%}", *per_token)
    return costs


def _memory_table(
    config: "ModelConfig", compression: CompressionConfig, dtype: str, device: float, mesh: AbstractMesh | None
) -> Table:
    """How many sequences fit in a device's memory, or in those of a mesh, dense and compressed, at a few contexts."""
    from mustafar_jax.models import memory

    usable, weights = memory.USABLE * device, memory.weight_nbytes(config, dtype, mesh)
    told = size(device) if mesh is None else f"{mesh.size} devices of {size(device)} ({_sizes(mesh)})"
    each = "" if mesh is None else " a device"
    title = f"Sequences that fit in {told}, {memory.USABLE:.0%} of it used; weights {size(weights)}{each}, {dtype}"
    fits = table(title, ("context", "dense", "compressed", "times dense", "set aside"))
    for length in _contexts(config):
        dense, held = (
            memory.largest_batch(usable, config, how, capacity=length, dtype=dtype, mesh=mesh)
            for how in (DENSE, compression)
        )
        least = 1 if mesh is None else mesh.shape["data"]
        full = memory.plan(config, compression, batch=max(held, least), capacity=length, dtype=dtype, mesh=mesh)
        working = size(full.working + full.fragments)
        fits.add_row(f"{length:,}", f"{dense:,}", f"{held:,}", f"{held / dense:.2f}" if dense else "", working)
    return fits


def _sizes(mesh: AbstractMesh) -> str:
    return ", ".join(f"{axis}={count}" for axis, count in mesh.shape.items() if count > 1)


def _contexts(config: "ModelConfig") -> list[int]:
    """Context lengths to show: those of `CONTEXTS` below the model's own, and that one."""
    longest = config.max_position_embeddings
    return [length for length in CONTEXTS if length < longest] + [longest]
