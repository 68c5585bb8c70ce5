"""Prompts in chunks of one size: what is held of a layer is bounded, and one compiled chunk serves for any prompt."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.backends.registry import Names, packers
from mustafar_jax.cache import DenseCache, LayerCache, prefill
from mustafar_jax.generation.checks import DENSE, check_integer
from mustafar_jax.generation.programs import last_programs
from mustafar_jax.generation.protocols import Caches, ChunkLayer, Model, Progress


class Scratch(NamedTuple):
    """What one layer has made of the chunks until now: a dense cache, and queries [B, n, N, H], n whole chunks."""

    dense: LayerCache
    queries: jax.Array


def prefill_chunks(
    model: Model,
    tokens: jax.Array,
    lengths: jax.Array,
    caches: Caches,
    chunk: int,
    names: Names | None,
    progress: Progress | None,
) -> tuple[jax.Array, Caches]:
    """`prefill_prompt`, some tokens of all prompts at a time.

    A layer's keys and values stay dense until its last chunk. So rules and statistics see the whole prompt, as they do
    of one piece.
    """
    size = min(check_chunk(model, chunk), caches[0].capacity)
    if tokens.shape[1] > caches[0].capacity:
        raise ValueError(f"tokens has {tokens.shape[1]} a prompt; the caches' capacity is {caches[0].capacity}")
    given, own = np.asarray(jax.device_get(tokens)), np.asarray(jax.device_get(lengths))
    starts = range(0, given.shape[1], size)
    hidden, counts = [], []
    for start in starts:
        part = given[:, start : start + size]
        part = np.pad(part, ((0, 0), (0, size - part.shape[1])))
        hidden.append(_embed(model, jax.device_put(part)))
        counts.append(jax.device_put(np.clip(own - start, 0, size).astype(np.int32)))
    filled = list(caches)
    for number, layer in enumerate(model.layers):
        scratch = _empty(layer, hidden[0], filled[number])
        for place, count in enumerate(counts):
            hidden[place], scratch = _run_chunk(layer, hidden[place], scratch, count, jax.device_put(starts[place]))
        filled[number] = _fill(filled[number], scratch, lengths, names=names)
        if progress is not None:
            jax.block_until_ready(filled[number].lengths)
            progress(number + 1, len(filled))
    last = jnp.zeros_like(hidden[0][:, 0])
    for place, start in enumerate(starts):
        last = _last(last, hidden[place], lengths, jax.device_put(start))
    return _logits(model, last), tuple(filled)


def check_chunk(model: Model, chunk: Any) -> int:
    """The argument of `prefill_prompt`; ValueError below 1, TypeError where the model's layers take no chunks."""
    chunk = check_integer("chunk", chunk)
    if chunk < 1:
        raise ValueError(f"{chunk=} must be an integer of at least 1")
    if any(not hasattr(layer, "run_chunk") for layer in model.layers):
        raise TypeError("the model's layers lack `run_chunk`, by which a prompt passes in chunks")
    return chunk


@last_programs()
def _empty(layer: ChunkLayer, hidden: jax.Array, cache: LayerCache) -> Scratch:
    """The scratch of a layer for a cache, before its first chunk [B, n, D]."""
    sizes = {name: getattr(cache, name) for name in ("batch", "capacity", "num_kv_heads", "head_dim", "dtype")}
    dense, chunk = LayerCache.init(DENSE, **sizes), hidden.shape[1]
    _, query, _ = jax.eval_shape(layer.run_chunk, hidden, dense, cache.lengths)
    chunks = -(-cache.capacity // chunk)
    return Scratch(dense, jnp.zeros((cache.batch, chunks * chunk, *query.shape[2:]), query.dtype))


@last_programs(donate_argnames=("hidden", "scratch"))
def _run_chunk(
    layer: ChunkLayer, hidden: jax.Array, scratch: Scratch, count: jax.Array, start: jax.Array
) -> tuple[jax.Array, Scratch]:
    """Run the next chunk [B, n, D], of which there are `count` [B] tokens, through one layer."""
    hidden, query, dense = layer.run_chunk(hidden, scratch.dense, count)
    return hidden, Scratch(dense, lax.dynamic_update_slice_in_dim(scratch.queries, query, start, axis=1))


@last_programs(static_argnames="names", donate_argnames="cache")
def _fill(cache: LayerCache, scratch: Scratch, lengths: jax.Array, *, names: Names | None) -> LayerCache:
    """An empty cache with what all chunks made."""
    dense, queries = scratch.dense, scratch.queries[:, : cache.capacity]
    assert isinstance(dense, DenseCache)
    return prefill(cache, dense.key, dense.value, lengths, query=queries, implementation=packers(names))


@jax.jit
def _embed(model: Model, tokens: jax.Array) -> jax.Array:
    """int32 [B, n] -> hidden [B, n, D]."""
    return model.embed(tokens)


@functools.partial(jax.jit, donate_argnums=0)
def _last(last: jax.Array, hidden: jax.Array, lengths: jax.Array, start: jax.Array) -> jax.Array:
    """[B, D], with the states of the prompts whose last token is in this chunk [B, n, D]."""
    place = lengths - 1 - start
    found = jnp.take_along_axis(hidden, place[:, None, None], axis=1, mode="clip")[:, 0]
    return jnp.where(((place >= 0) & (place < hidden.shape[1]))[:, None], found, last)


@jax.jit
def _logits(model: Model, last: jax.Array) -> jax.Array:
    return model.logits(last)
