"""Where a generation stands, and how it comes to its next token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.generation.mesh import new_caches
from mustafar_jax.generation.prefill import extend_prompt, prefill_prompt
from mustafar_jax.generation.protocols import Caches, Model
from mustafar_jax.generation.request import Request
from mustafar_jax.generation.sampling import Sampling, Stops, choose, is_stop


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "finished", "lengths", "finite", "overflow", "step", "caches"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a generation stands.

    Attributes:
        token: int32 [B], not yet in the caches.
        finished: bool [B], whether each sequence has stopped.
        lengths: int32 [B], tokens that each sequence has got.
        finite: bool [B], whether each sequence had logits to choose all its tokens from.
        overflow: bool [B], whether something of it did not fit in a cache before it stopped.
        step: int32, steps so far; a sequence that has not stopped got a token in each.
        caches: one per layer.
    """

    token: jax.Array
    finished: jax.Array
    lengths: jax.Array
    finite: jax.Array
    overflow: jax.Array
    step: jax.Array
    caches: Caches

    @property
    def pending(self) -> jax.Array:
        """bool [B], whether `token` is a token of the sequence, rather than what fills the row of one that stopped."""
        return self.lengths == self.step


Shown = tuple[jax.Array, jax.Array, jax.Array]
"""What the host looks at after a step: tokens, int32 [B]; whether any sequence got one; whether all have stopped."""


def decode_step(
    model: Model,
    token: jax.Array,
    caches: Caches,
    *,
    implementation: Implementation = None,
    there: jax.Array | None = None,
) -> tuple[jax.Array, Caches]:
    """Run one token per sequence through the model.

    Args:
        model: the model.
        token: int32 [B].
        caches: one per layer.
        implementation: as in `generate`.
        there: bool [B], the sequences that have a token; the caches of the others are left alone, and their logits mean
            nothing. None means all; anything else needs layers that can `extend`.

    Returns:
        float32 logits [B, V], and the caches with the tokens.
    """
    hidden = model.embed(token)
    grown = []
    for layer, cache in zip(model.layers, caches, strict=True):
        if there is None:
            hidden, cache = layer.decode(hidden, cache, implementation=implementation)
        else:
            one, count = hidden[:, None], there.astype(jnp.int32)
            one, cache = layer.extend(one, cache, count, implementation=implementation)  # type: ignore[attr-defined]
            hidden = one[:, 0]
        grown.append(cache)
    return model.logits(hidden), tuple(grown)


def start(model: Model, request: Request) -> tuple[DecodeState, Shown]:
    """Run the prompts through the model, and choose the first token."""
    how: dict[str, Any] = {"implementation": request.implementation, "progress": request.progress}
    if request.caches is None:
        caches = new_caches(model, request.config, len(request.tokens), request.capacity, request.sharding)
        logits, caches = prefill_prompt(model, request.tokens, request.lengths, caches, **how)
    else:
        logits, caches = extend_prompt(model, request.tokens, request.lengths, request.caches, **how)
    state, shown = _first(logits, [cache.overflow for cache in caches], request.sampling, request.stops)
    return dataclasses.replace(state, caches=caches), shown


@jax.jit
def _first(
    logits: jax.Array, overflow: list[jax.Array], sampling: Sampling | None, stops: Stops
) -> tuple[DecodeState, Shown]:
    """The state, but for the caches, after the prompts' logits [B, V] and their caches' flags [B]."""
    zeros, never = jnp.zeros(len(logits), jnp.int32), jnp.zeros(len(logits), bool)
    state = DecodeState(zeros, never, zeros, ~never, never, jnp.int32(0), ())
    state = _advanced(state, logits, overflow, ~never, sampling, stops)
    return state, shown(state)


def shown(state: DecodeState) -> Shown:
    """What the host looks at."""
    return state.token, state.pending.any(), state.finished.all()


def advance(
    model: Model,
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    *,
    implementation: Implementation,
    keep: bool,
) -> DecodeState:
    """The next token of every sequence.

    Args:
        model: the model.
        state: before.
        sampling, stops, implementation, keep: as in `Request`.
    """
    there = state.pending if keep else None
    logits, caches = decode_step(model, state.token, state.caches, implementation=implementation, there=there)
    # Where caches are not kept, what one is given of a sequence that has stopped is no token of it.
    counts = state.pending if keep else ~state.finished
    state = _advanced(state, logits, [cache.overflow for cache in caches], counts, sampling, stops)
    return dataclasses.replace(state, caches=caches)


def _advanced(
    state: DecodeState,
    logits: jax.Array,
    overflow: list[jax.Array],
    counts: jax.Array,
    sampling: Sampling | None,
    stops: Stops,
) -> DecodeState:
    """The state with one more token of every sequence that has not stopped, 0 for the others; with its old caches.

    Args:
        state: before.
        logits: float32 [B, V], of the token to come. A sequence stops where there is none to be chosen.
        overflow: bool [B] each, whether something of a sequence did not fit in a layer's cache.
        counts: bool [B], the sequences of which that counts.
        sampling, stops: as in `Request`.
    """
    is_finite = jnp.isfinite(logits.max(axis=-1))  # a model may give some tokens -inf
    writes = ~state.finished & is_finite
    token = jnp.where(writes, choose(logits, sampling, stops, state.step), 0)
    lost = functools.reduce(jnp.logical_or, overflow, jnp.zeros_like(state.overflow)) & counts
    return DecodeState(
        token=token,
        finished=~writes | is_stop(token, stops) | (state.step + 1 >= stops.latest),
        lengths=state.lengths + writes.astype(jnp.int32),
        finite=state.finite & (state.finished | is_finite),
        overflow=state.overflow | lost,
        step=state.step + 1,
        caches=state.caches,
    )
