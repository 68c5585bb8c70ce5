"""The device memory that a generation takes: weights, caches, and what prefill and decoding work in."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

from mustafar_jax.attention import prefill_attention_nbytes
from mustafar_jax.backends import registry
from mustafar_jax.cache import LayerCache, PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.prefill import prefilled_tokens
from mustafar_jax.models.config import ModelConfig, rope_frequencies
from mustafar_jax.models.llama import Llama, feed_forward_nbytes, shapes_of
from mustafar_jax.sharding import CacheSharding, weight_spec

USABLE = 0.95
"""The share of a device's memory to give JAX, by XLA_PYTHON_CLIENT_MEM_FRACTION; the driver takes some of the rest."""

RESERVE = 500_000_000
"""Bytes set aside for what does not grow with the model: compiled programs, workspaces of libraries."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a generation.

    Attributes:
        weights: of the model, exact.
        caches: of all layers and sequences, exact.
        working: an allowance for what prefill and decoding hold beside them; `working_nbytes` says what is in it.
        fragments: an allowance for gaps between arrays, too small for what is to be allocated: one layer's caches.
    """

    weights: int
    caches: int
    working: int
    fragments: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.caches + self.working + self.fragments


def plan(
    config: ModelConfig,
    compression: CompressionConfig,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
) -> MemoryPlan:
    """What `batch` sequences of up to `capacity` tokens, prompt and new ones together, take; nothing is allocated.

    `generate` makes caches for `generation.padded` of prompt and new tokens together, unless `padding=False`. On a mesh
    the bytes are those of one device, whose part of a model works as a smaller model does; a prompt passes whole
    through all devices of a context axis.
    """
    if mesh is None:
        [layer] = {cache.nbytes * batch for cache in abstract_caches(config, compression, capacity, dtype=dtype)}
        working = working_nbytes(config, compression, batch=batch, length=capacity, dtype=dtype)
        return MemoryPlan(weight_nbytes(config, dtype), layer * config.num_layers, working, fragments=layer)
    sharding = CacheSharding.of(mesh).for_heads(config.num_kv_heads)
    options: dict[str, Any] = {"batch": batch, "dtype": dtype, "sharding": sharding}
    layer = device_nbytes(abstract_caches(config, compression, capacity, **options)[0])
    own, sequences = _own_part(config, sharding), batch // sharding.size("batch")
    working = working_nbytes(own, compression, batch=sequences, length=capacity, dtype=dtype)
    return MemoryPlan(weight_nbytes(config, dtype, mesh), layer * config.num_layers, working, fragments=layer)


def device_nbytes(cache: LayerCache) -> int:
    """Bytes of a spread cache, or of its shapes, on one device."""
    assert cache.sharding is not None
    mesh = cache.sharding.mesh

    def of_leaf(leaf: jax.Array, spec: PartitionSpec) -> int:
        return leaf.size * leaf.dtype.itemsize // math.prod(mesh.shape[axis] for axis in spec if axis is not None)

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, cache, cache.partition_specs())))


def _own_part(config: ModelConfig, sharding: CacheSharding) -> ModelConfig:
    """A model of the sizes that one device has of this one."""
    devices = sharding.size("kv_heads")

    def part(size: int) -> int:
        return size // devices if size % devices == 0 else size

    split = "num_heads", "intermediate_size", "vocab_size"
    sizes: dict[str, Any] = {name: part(getattr(config, name)) for name in split}
    return dataclasses.replace(config, **sizes, num_kv_heads=max(1, config.num_kv_heads // devices))


def largest_batch(
    memory: float,
    config: ModelConfig,
    compression: CompressionConfig,
    *,
    capacity: int,
    dtype: DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
) -> int:
    """How many sequences of up to `capacity` tokens, as in `plan`, fit in `memory` bytes; 0 if not even one does.

    On a mesh in so many of each device; as many sequences as there are parts of a batch come at once.
    """
    options: dict[str, Any] = {"capacity": capacity, "dtype": dtype, "mesh": mesh}
    unit = 1 if mesh is None else CacheSharding.of(mesh).size("batch")
    one = plan(config, compression, batch=unit, **options)
    few, many = 0, max(0, int(memory - one.weights) // one.caches) + 1
    while many - few > 1:  # few fit, many do not
        middle = (few + many) // 2
        fits = plan(config, compression, batch=middle * unit, **options).total <= memory
        few, many = (middle, many) if fits else (few, middle)
    return few * unit


def weight_nbytes(config: ModelConfig, dtype: DTypeLike, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Bytes of a model's weights; on a mesh, of those of one device."""
    return num_weights(config, mesh) * jnp.dtype(dtype).itemsize


@functools.lru_cache
def num_weights(config: ModelConfig, mesh: Mesh | AbstractMesh | None = None) -> int:
    """How many numbers a model's weights are; on a mesh, those of one device."""
    model = shapes_of(lambda: Llama(config, rngs=nnx.Rngs(0)))

    def parts(variable: nnx.Variable[Any]) -> int:
        if mesh is None:
            return 1
        spec = weight_spec(variable.get_metadata()["out_sharding"], variable.shape, mesh)
        return math.prod(mesh.shape[axis] for axis in spec if axis is not None)

    return sum(variable.size // parts(variable) for _, variable in nnx.to_flat_state(nnx.state(model)))


def working_nbytes(
    config: ModelConfig, compression: CompressionConfig, *, batch: int, length: int, dtype: DTypeLike
) -> int:
    """An allowance for what prefill holds beside weights and caches on an NVIDIA GPU; decoding holds less.

    The hidden states of the tokens that are prefilled at a time, and the largest of what follows one another:
    attention or packing, each beside hidden states of its own, and the feed-forward network. Two float32 logits per
    sequence, and `RESERVE`.
    """
    total, tokens = batch * length, prefilled_tokens(batch, length)
    shape: dict[str, Any] = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "dtype": dtype}
    hidden = tokens * config.hidden_size * jnp.dtype(dtype).itemsize
    attending = prefill_attention_nbytes(tokens, length, num_heads=config.num_heads, **shape)
    packing = _packing_nbytes(abstract_caches(config, compression, length, dtype=dtype)[0], tokens)
    largest = max(hidden + attending, hidden + packing, feed_forward_nbytes(config, total, dtype))
    logits = 2 * 4 * batch * config.vocab_size
    return hidden + largest + logits + RESERVE


def _packing_nbytes(cache: LayerCache, tokens: int) -> int:
    """Bytes that packing `tokens` tokens into such a cache, or its shapes, works in on an NVIDIA GPU; 0 if it is dense.

    Keys and values twice where a kernel packs them, else four times.
    """
    if not isinstance(cache, PackedCache):
        return 0
    copies = 2 if _packed_by_kernel(cache) else 4
    return copies * 2 * cache.num_kv_heads * cache.head_dim * tokens * cache.dtype.itemsize


def _packed_by_kernel(cache: PackedCache) -> bool:
    """Whether a kernel packs such a cache on the GPUs that it runs on."""
    kernels = [name for name, backend in registry.BACKENDS.items() if backend.needs_cuda]
    found: list[bool] = []

    def look(cache: PackedCache) -> None:
        packing = cache.packing(cache.oldest(cache.packed_lengths, cache.packed_lengths))
        found.append(any(registry.why_not(name, "pack", packing) is None for name in kernels))

    jax.eval_shape(look, cache)
    return found[0]


def abstract_caches(
    config: ModelConfig,
    compression: CompressionConfig,
    capacity: int,
    *,
    batch: int = 1,
    dtype: DTypeLike,
    sharding: CacheSharding | None = None,
) -> list[LayerCache]:
    """The caches of all layers, as shapes: nothing is allocated."""
    cache = jax.eval_shape(
        lambda: LayerCache.init(
            compression,
            batch=batch,
            capacity=capacity,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            inv_freq=rope_frequencies(config),
            sharding=sharding,
        )
    )
    return [cache] * config.num_layers
