"""The device memory that a generation takes: weights, caches, and what prefill and decoding work in."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mustafar_jax.attention import prefill_attention_nbytes
from mustafar_jax.cache import LayerCache
from mustafar_jax.cache.packed import packing_nbytes
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.prefill import prefilled_tokens
from mustafar_jax.models.config import ModelConfig, rope_frequencies
from mustafar_jax.models.llama import Llama, feed_forward_nbytes, shapes_of

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
    config: ModelConfig, compression: CompressionConfig, *, batch: int, capacity: int, dtype: DTypeLike
) -> MemoryPlan:
    """What `batch` sequences of up to `capacity` tokens, prompt and new ones together, take; nothing is allocated.

    `generate` makes caches for `generation.padded` of prompt and new tokens together, unless `padding=False`.
    """
    [layer] = {cache.nbytes * batch for cache in abstract_caches(config, compression, capacity, dtype=dtype)}
    working = working_nbytes(config, compression, batch=batch, length=capacity, dtype=dtype)
    return MemoryPlan(weight_nbytes(config, dtype), layer * config.num_layers, working, fragments=layer)


def largest_batch(
    memory: float, config: ModelConfig, compression: CompressionConfig, *, capacity: int, dtype: DTypeLike
) -> int:
    """How many sequences of up to `capacity` tokens, as in `plan`, fit in `memory` bytes; 0 if not even one does."""
    options: dict[str, Any] = {"capacity": capacity, "dtype": dtype}
    one = plan(config, compression, batch=1, **options)
    few, many = 0, max(0, int(memory - one.weights) // one.caches) + 1
    while many - few > 1:  # few fit, many do not
        middle = (few + many) // 2
        fits = plan(config, compression, batch=middle, **options).total <= memory
        few, many = (middle, many) if fits else (few, middle)
    return few


def weight_nbytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes of a model's weights."""
    return num_weights(config) * jnp.dtype(dtype).itemsize


@functools.lru_cache
def num_weights(config: ModelConfig) -> int:
    """How many numbers a model's weights are."""
    model = shapes_of(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


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
    packing = packing_nbytes(abstract_caches(config, compression, length, dtype=dtype)[0], tokens)
    largest = max(hidden + attending, hidden + packing, feed_forward_nbytes(config, total, dtype))
    logits = 2 * 4 * batch * config.vocab_size
    return hidden + largest + logits + RESERVE


def abstract_caches(
    config: ModelConfig, compression: CompressionConfig, capacity: int, *, batch: int = 1, dtype: DTypeLike
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
        )
    )
    return [cache] * config.num_layers
