"""What generation needs of a model, and what it tells of its progress."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig

Caches = tuple[LayerCache, ...]
"""One cache per layer."""

Progress = Callable[[int, int], object]
"""Called as progress(done, total), in layers."""


class Layer(Protocol):
    """What generation needs of a decoder layer; a pytree, such as a Flax NNX module."""

    def prefill(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array, *, implementation: Implementation = None
    ) -> tuple[jax.Array, LayerCache]:
        """Right-padded prompts: hidden [B, S, D], an empty cache, int32 [B] -> hidden and the filled cache."""

    def decode(
        self, hidden: jax.Array, cache: LayerCache, *, implementation: Implementation = None
    ) -> tuple[jax.Array, LayerCache]:
        """One token per sequence: hidden [B, D] -> hidden and the cache with that token."""


class TurnLayer(Layer, Protocol):
    """What a generation needs of a decoder layer beside, whose caches are to be kept."""

    def extend(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array, *, implementation: Implementation = None
    ) -> tuple[jax.Array, LayerCache]:
        """Right-padded tokens after those of the cache: hidden [B, n, D], int32 [B] -> hidden and the grown cache.

        A sequence of length 0 is left alone.
        """


class ChunkLayer(Layer, Protocol):
    """What `prefill_prompt` needs of a decoder layer beside, where prompts are to pass in chunks."""

    def run_chunk(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """`TurnLayer.extend` of a dense cache, which gives the queries [B, n, N, H] after RoPE as well."""


class BlockLayer(TurnLayer, Protocol):
    """What `scoring.by_blocks` needs of a decoder layer beside."""

    def run_prompt(self, hidden: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Right-padded prompts, without a cache: hidden [B, S, D], int32 [B] -> hidden, and query, key and value."""


class Model(Protocol):
    """What generation needs of a language model; a pytree, such as a Flax NNX module."""

    @property
    def config(self) -> Any:
        """The model's shape: vocab_size, max_position_embeddings and, if it is there, eos_ids are read."""

    @property
    def layers(self) -> Iterable[Layer]:
        """The decoder layers, all of one structure, so that a function jitted over one compiles once."""

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> hidden [..., D]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]."""

    def init_cache(self, config: CompressionConfig, *, batch: int, capacity: int) -> Caches:
        """One empty cache per layer. Of a model on a mesh it takes `sharding` as well, as `LayerCache.init` does."""
