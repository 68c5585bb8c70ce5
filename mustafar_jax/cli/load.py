"""The model that a command's options name."""

import argparse
from typing import Any

from jax.sharding import Mesh
from rich.progress import Progress

from mustafar_jax.cache.base import check_batch, check_rules
from mustafar_jax.cli.render import bar
from mustafar_jax.config import CompressionConfig
from mustafar_jax.sharding import CacheSharding, make_mesh


def load_model(options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer, None if it has none."""
    from mustafar_jax import models  # brings Flax and transformers, which --help need not wait for

    return models.load(options.model, dtype=options.dtype, mesh=mesh_of(options), progress=bar(progress, "loading"))


def mesh_of(options: argparse.Namespace) -> Mesh | None:
    """The mesh that --mesh asks for; ValueError where there are not as many devices."""
    sizes = getattr(options, "mesh", None)
    return None if sizes is None else make_mesh(sizes)


def open_on_mesh(
    options: argparse.Namespace, config: CompressionConfig, batch: int | None = None
) -> tuple[Any, Any, Any]:
    """The opened checkpoint, its tokenizer and the mesh, checked before any weights are read.

    ValueError where there is no tokenizer, and where the model, its caches or the batch cannot be split over the mesh.
    """
    from mustafar_jax import models

    mesh = mesh_of(options)
    checkpoint, tokenizer = open_with_tokenizer(options)
    if mesh is not None:
        models.check_mesh(mesh, checkpoint.config)
        sharding = CacheSharding.of(mesh).for_heads(checkpoint.config.num_kv_heads)
        check_rules(sharding, config)
        check_batch(sharding, batch or sharding.size("batch"))
    return checkpoint, tokenizer, mesh


def load_with_tokenizer(options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer; ValueError where it has none."""
    model, tokenizer = load_model(options, progress)
    return model, _wanted(options, tokenizer)


def open_with_tokenizer(options: argparse.Namespace) -> tuple[Any, Any]:
    """The opened checkpoint, of which no weights are read yet, and its tokenizer; ValueError where it has none."""
    from mustafar_jax import models

    checkpoint = models.open_checkpoint(options.model, dtype=options.dtype)
    return checkpoint, _wanted(options, checkpoint.load_tokenizer())


def _wanted(options: argparse.Namespace, tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError(f"--model {options.model} holds no tokenizer, which turning text into tokens needs")
    return tokenizer
