"""Caches that outlast a call: those that are given, and the room that is asked for, checked before any work."""

import functools
from typing import Any

import jax
import numpy as np

from mustafar_jax.cache import LayerCache
from mustafar_jax.cache.alike import difference, kind_of
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import check_integer
from mustafar_jax.generation.protocols import Caches, Model
from mustafar_jax.sharding import CacheSharding


def config_of(caches: Any, config: CompressionConfig | None) -> CompressionConfig | None:
    """The config that is named, or that of the caches, which is checked to be one for all later."""
    if config is None and caches is not None:
        return _each(caches)[0].config
    return config


def check_kept(
    model: Model,
    caches: Any,
    capacity: Any,
    config: CompressionConfig,
    lengths: jax.Array,
    max_new_tokens: int,
    sharding: CacheSharding | None = None,
) -> tuple[Caches | None, int]:
    """The arguments `caches` and `capacity` of `generate`, of which at least one is given, with its errors.

    Args:
        model: the model.
        caches, capacity: as in `generate`.
        config: that the caches should have.
        lengths: int32 [B], of the prompts.
        max_new_tokens: tokens that follow each.
        sharding: that the caches should have.

    Returns:
        The caches, None if they are to be made, and their capacity.
    """
    if any(not hasattr(layer, "extend") for layer in model.layers):
        raise TypeError("the model's layers lack `extend`, by which a prompt goes on from caches that are kept")
    context = model.config.max_position_embeddings
    if capacity is not None:
        capacity = check_integer("capacity", capacity)
        if not 1 <= capacity <= context:
            raise ValueError(f"{capacity=} must lie in 1 .. {context}, the model's context")
    held, given = np.zeros(len(lengths), int), None
    if caches is not None:
        given = _each(caches)
        if capacity not in (None, given[0].capacity):
            raise ValueError(f"{capacity=}, but the caches that are given have one of {given[0].capacity}")
        capacity = given[0].capacity
        _check_alike(model, given, config, len(lengths))
        _check_places(given, sharding)
        held = _held(given)
    _check_room(held, np.asarray(jax.device_get(lengths)), max_new_tokens, min(capacity, context))
    return given, capacity


def _each(caches: Any) -> Caches:
    """The caches, one or more, that are there; TypeError or ValueError for anything else."""
    if not isinstance(caches, tuple | list) or not caches or not all(isinstance(cache, LayerCache) for cache in caches):
        raise TypeError(f"caches is of type {type(caches).__name__}; wanted those that a generation gave back")
    for number, cache in enumerate(caches):
        for leaf in jax.tree.leaves(cache):
            if isinstance(leaf, jax.core.Tracer):
                raise TypeError("caches are traced; call this outside of jit, it compiles what it runs")
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise ValueError(
                    f"caches[{number}] was donated to an earlier call; wanted the caches that this call gave back "
                    "(mj.repeat(caches, 1) makes a copy)"
                )
    return tuple(caches)


def _check_alike(model: Model, caches: Caches, config: CompressionConfig, batch: int) -> None:
    """Raise ValueError for caches that are none of this model's, of this batch and config."""
    make = functools.partial(model.init_cache, config, batch=batch, capacity=caches[0].capacity)
    wanted = jax.eval_shape(make)
    if len(caches) != len(wanted):
        raise ValueError(f"caches has {len(caches)} layers, the model {len(wanted)}")
    for number, (cache, other) in enumerate(zip(caches, wanted, strict=True)):
        found, expected = kind_of(cache), kind_of(other)
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(f"caches[{number}]: {difference(name, found[name], value)}")


def _check_places(caches: Caches, sharding: CacheSharding | None) -> None:
    """Raise ValueError for caches that are spread over a mesh otherwise than the model is."""
    wanted = sharding and sharding.for_heads(caches[0].num_kv_heads)
    for number, cache in enumerate(caches):
        if cache.sharding != wanted:  # both on Auto axes
            raise ValueError(f"caches[{number}] are spread by {cache.sharding}; the model's weights want {wanted}")


def _held(caches: Caches) -> np.ndarray:
    """Tokens that each sequence holds, int [B]; ValueError where the layers do not agree."""
    lengths = np.stack(jax.device_get([cache.lengths for cache in caches]))
    if len(others := np.flatnonzero((lengths != lengths[0]).any(axis=1))):
        one, other = lengths[0].tolist(), lengths[others[0]].tolist()
        raise ValueError(f"caches[{others[0]}] holds {other} tokens, caches[0] {one}; wanted the same in all layers")
    return lengths[0]


def _check_room(held: np.ndarray, lengths: np.ndarray, max_new_tokens: int, room: int) -> None:
    """Raise ValueError for the first sequence whose tokens, held and to come, find no room."""
    if len(over := np.flatnonzero(held + lengths + max_new_tokens > room)):
        row = int(over[0])
        raise ValueError(
            f"sequence {row} holds {held[row]} tokens; {lengths[row]} of its prompt and {max_new_tokens=} exceed the "
            f"capacity of {room}"
        )
