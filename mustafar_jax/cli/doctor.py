"""`mustafar doctor`: what is installed, and which backends a cache would take on this device."""

import argparse
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

import mustafar_jax
from mustafar_jax.cache import LayerCache
from mustafar_jax.cli.compression import add_compression, config_of
from mustafar_jax.cli.parser import MODEL, add_dtype
from mustafar_jax.config import CompressionConfig
from mustafar_jax.explain import explain
from mustafar_jax.generation import DENSE

SHAPE = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
"""Of a layer where no model is named: Llama 3's."""

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "gguf")


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("doctor", help="which backends a cache would take on this device, and why not better")
    command.set_defaults(run=run)
    command.add_argument("--model", help=f"{MODEL}; a layer of Llama 3's shape unless given")
    add_dtype(command, "bfloat16")
    add_compression(command)


def run(options: argparse.Namespace) -> None:
    """Print versions, devices, and the backends for a dense and for a compressed cache."""
    compression, shape, window = config_of(options), dict(SHAPE), None
    inv_freq: Any = np.ones(SHAPE["head_dim"] // 2)
    if options.model is not None:
        from mustafar_jax import models
        from mustafar_jax.models.config import rope_frequencies

        model = models.load_config(options.model)
        shape = {name: getattr(model, name) for name in SHAPE}
        window, inv_freq = model.sliding_window, rope_frequencies(model)
    print(f"mustafar_jax {mustafar_jax.__version__}, Python {platform.python_version()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    print(f"devices: {', '.join(f'{device.id} {device.device_kind}' for device in jax.devices())}")
    for name, config in (("dense cache", DENSE), ("compressed cache", compression)):
        cache = _abstract_cache(config, shape, options.dtype or "bfloat16", inv_freq)
        print(f"\n{name}, num_heads={shape['num_heads']}: {cache}")
        print(explain(cache, num_heads=shape["num_heads"], sliding_window=window))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _abstract_cache(config: CompressionConfig, shape: dict[str, Any], dtype: str, inv_freq: Any) -> LayerCache:
    """One sequence's cache of one layer, with room for enough tokens to pack some; as shapes."""
    capacity = config.sink_tokens + config.residual_length + config.group
    return jax.eval_shape(
        lambda: LayerCache.init(config, batch=1, capacity=capacity, dtype=dtype, inv_freq=inv_freq, **shape)
    )
