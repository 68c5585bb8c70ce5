"""What is asked for, checked as a whole before any work: `generate`, `stream` and `log_likelihoods` begin here."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Implementation, Names, check_implementation
from mustafar_jax.cache.base import check_batch, check_rules
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import (
    check_config,
    check_flag,
    check_integer,
    check_model,
    check_progress,
    check_prompt_lengths,
    check_tokens,
)
from mustafar_jax.generation.kept import check_kept, config_of
from mustafar_jax.generation.mesh import check_mesh, new_caches
from mustafar_jax.generation.programs import pad_tokens, padded
from mustafar_jax.generation.protocols import Caches, Model, Progress
from mustafar_jax.generation.sampling import Sampling, Stops, check_sampling, check_stops
from mustafar_jax.sharding import CacheSharding


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked arguments of a generation.

    Attributes:
        tokens: int32 [B, S], padded.
        lengths: int32 [B], each prompt's own.
        capacity: tokens that a cache is to have room for, S and max_new_tokens or more.
        max_new_tokens: as in `generate`.
        config: how the caches are compressed.
        sampling: how tokens are drawn; None where the likeliest is taken.
        stops: what ends a sequence.
        implementation: as in `generate`, in a hashable form.
        progress: as in `generate`.
        keep: whether the caches are given back, with all tokens.
        caches: those to go on from; None where they begin empty.
        sharding: how caches are spread; None leaves it to the compiler.
    """

    tokens: jax.Array
    lengths: jax.Array
    capacity: int
    max_new_tokens: int
    config: CompressionConfig
    sampling: Sampling | None
    stops: Stops
    implementation: Names | None
    progress: Progress | None
    keep: bool
    caches: Caches | None
    sharding: CacheSharding | None


def check_split(model: Model, mesh: Mesh | None, batch: int, config: CompressionConfig) -> CacheSharding | None:
    """How caches are to be spread, as `check_mesh` has it; ValueError for a batch or rules that cannot be split."""
    sharding = check_mesh(model, mesh)
    if sharding is not None:
        check_batch(sharding, batch)
        check_rules(sharding, config)
    return sharding


def check_request(
    model: Model,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | Sequence[int] | None,
    config: CompressionConfig | None,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    key: jax.Array | None,
    eos_id: int | Sequence[int] | None,
    min_new_tokens: int,
    implementation: Implementation,
    progress: Progress | None,
    padding: bool,
    capacity: int | None,
    caches: Caches | None,
    mesh: Mesh | None = None,
) -> Request:
    """The arguments of `generate`, with its errors."""
    config = config_of(caches, config)
    texts = check_texts(model, tokens, config, implementation, progress)
    batch, length = texts.tokens.shape
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be an integer of at least 1")
    own = check_prompt_lengths(lengths, batch, length)
    sampling = check_sampling(temperature, top_k, top_p, min_p, key)
    stops = check_stops(model, eos_id, min_new_tokens, max_new_tokens)
    sharding = check_split(model, mesh, batch, texts.config)
    padding, keep = check_flag("padding", padding), capacity is not None or caches is not None
    if keep:
        caches, capacity = check_kept(model, caches, capacity, texts.config, own, max_new_tokens, sharding)
    else:
        capacity = _capacity(model, texts.tokens.shape, max_new_tokens, padding)
    check_caches(model, texts, capacity, sharding)
    given = jax.device_get(texts.tokens)
    where = None if sharding is None else NamedSharding(sharding.mesh, sharding.spec("batch"))
    return Request(
        tokens=jax.device_put(pad_tokens(given, capacity) if padding else given, where),
        lengths=own if where is None else jax.device_put(jax.device_get(own), where),
        capacity=capacity,
        max_new_tokens=max_new_tokens,
        config=texts.config,
        sampling=sampling,
        stops=stops,
        implementation=texts.implementation,
        progress=progress,
        keep=keep,
        caches=caches,
        sharding=sharding,
    )


def _capacity(model: Model, shape: tuple[int, ...], max_new_tokens: int, padding: bool) -> int:
    """Room for prompts [B, S] and what follows them; ValueError where the model's context has none."""
    length, context = shape[1], model.config.max_position_embeddings
    if length + max_new_tokens > context:
        raise ValueError(
            f"{length} tokens of prompt and {max_new_tokens=} exceed the model's context of {context}; "
            f"tokens has shape {shape}, padding included"
        )
    return padded(length + max_new_tokens, context) if padding else length + max_new_tokens


class Texts(NamedTuple):
    """The checked arguments that a generation and scoring share: int32 [B, S], how to compress, who attends."""

    tokens: jax.Array
    config: CompressionConfig
    implementation: Names | None


def check_texts(
    model: Model,
    tokens: ArrayLike,
    config: CompressionConfig | None,
    implementation: Implementation,
    progress: Progress | None,
) -> Texts:
    """Each of these arguments by itself."""
    check_model(model)
    given = check_tokens(model, tokens)
    compression = check_config(config)
    check_progress(progress)
    return Texts(given, compression, check_implementation(implementation))


def check_caches(model: Any, texts: Texts, capacity: int, sharding: CacheSharding | None = None) -> None:
    """Raise what the model's caches, or attention on them, would: that shows in tracing, and nothing is allocated."""
    batch, names = len(texts.tokens), texts.implementation
    caches = jax.eval_shape(functools.partial(new_caches, model, texts.config, batch, capacity, sharding))
    if names is not None:  # the best that works does work
        hidden = jax.eval_shape(model.embed, jax.ShapeDtypeStruct((batch,), jnp.int32))
        jax.eval_shape(functools.partial(next(iter(model.layers)).decode, implementation=names), hidden, caches[0])
