"""Text from a model through its layers' caches: jit-compiled prefill and decode, sampling, streaming."""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.prefill import prefill_prompt
from mustafar_jax.generation.protocols import Caches, Model, Progress
from mustafar_jax.generation.request import Request, check_request
from mustafar_jax.generation.sampling import Sampling, Stops, choose, is_stop

STEPS_PER_CHECK = 16
"""Steps that `generate` takes between looks at whether all sequences have stopped: on a GPU the host waits to look."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "lengths", "overflow"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns. A pytree.

    Attributes:
        tokens: int32 [B, max_new_tokens]; 0 after a stop token.
        lengths: int32 [B], tokens up to and with the stop token, or max_new_tokens.
        overflow: bool [B], whether a value of the sequence, in any layer's cache, needed more than `config.v_slots`:
            what did not fit was missing from then on.
    """

    tokens: jax.Array
    lengths: jax.Array
    overflow: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["token", "finished", "overflow", "step", "caches"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a generation stands.

    Attributes:
        token: int32 [B], not yet in the caches.
        finished: bool [B], whether each sequence has stopped.
        overflow: bool [B], whether something of it did not fit in a cache before it stopped.
        step: int32, tokens so far.
        caches: one per layer.
    """

    token: jax.Array
    finished: jax.Array
    overflow: jax.Array
    step: jax.Array
    caches: Caches


def generate(
    model: Model,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | Sequence[int] | None = None,
    config: CompressionConfig | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    min_new_tokens: int = 0,
    implementation: Implementation = None,
    progress: Progress | None = None,
) -> Generation:
    """Continue a batch of prompts.

    Args:
        model: the model; a Flax NNX model of `mustafar_jax.models`, or any pytree with the methods of `Model`.
        tokens: int [B, S], the prompts, padded on the right.
        max_new_tokens: tokens to generate at most.
        lengths: int [B], the prompts' own lengths, 1 .. S; S if None.
        config: how the caches are compressed; a dense cache if None.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum; below 1 it needs a temperature.
        key: a `jax.random.key`, needed where temperature > 0. Each step and each row of the batch draws with its own.
        eos_id: the token, or tokens, that end a sequence; if None, the model's own, `model.config.eos_ids`, where it
            has some; with (), none does.
        min_new_tokens: tokens of a sequence before which none of `eos_id` is written, 0 .. max_new_tokens.
        implementation: of attention on caches, as in `decode_attention`, and of packing, by those of the names that
            pack ("triton", "xla"): "xla" is XLA for both. Where none of the names packs, the best that works here
            does. Attention over the prompts is dense and always the best that works here.
        progress: called as progress(done, total) after each layer of the prefill.

    Raises:
        ValueError: an argument out of its range, an empty prompt, a (padded) prompt and max_new_tokens that together
            exceed the model's context.
        TypeError: an argument of another type, such as a path in place of a model, or text in place of tokens.
        NotImplementedError: no implementation that was named can attend the caches. Like the others, before any work.
    """
    request = check_request(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        lengths=lengths,
        config=config,
        temperature=temperature,
        top_p=top_p,
        key=key,
        eos_id=eos_id,
        min_new_tokens=min_new_tokens,
        implementation=implementation,
        progress=progress,
    )
    state, how = _start(model, request), (request.sampling, request.stops, request.implementation)
    written, count, state = _decode_loop(model, state, *how, request.max_new_tokens)
    return Generation(written, count, state.overflow)


def stream(
    model: Model,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | Sequence[int] | None = None,
    config: CompressionConfig | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    min_new_tokens: int = 0,
    implementation: Implementation = None,
    progress: Progress | None = None,
) -> Generator[np.ndarray, None, np.ndarray]:
    """Continue a batch of prompts, yielding each step's tokens, int32 [B], as they come.

    Arguments, errors and tokens are those of `generate`; the stream ends when every sequence has stopped. What the
    generator returns then, its StopIteration's value, is `Generation.overflow`.
    """
    request = check_request(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        lengths=lengths,
        config=config,
        temperature=temperature,
        top_p=top_p,
        key=key,
        eos_id=eos_id,
        min_new_tokens=min_new_tokens,
        implementation=implementation,
        progress=progress,
    )
    return _steps(model, request)


def decode_step(
    model: Model, token: jax.Array, caches: Caches, *, implementation: Implementation = None
) -> tuple[jax.Array, Caches]:
    """Run one token per sequence through the model: int32 [B], caches -> float32 logits [B, V], the caches with it."""
    hidden = model.embed(token)
    grown = []
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden, cache = layer.decode(hidden, cache, implementation=implementation)
        grown.append(cache)
    return model.logits(hidden), tuple(grown)


def _start(model: Model, request: Request) -> DecodeState:
    """Prefill, and choose the first token."""
    batch, length = request.tokens.shape
    caches = model.init_cache(request.config, batch=batch, capacity=length + request.max_new_tokens)
    how: dict[str, Any] = {"implementation": request.implementation, "progress": request.progress}
    logits, caches = prefill_prompt(model, request.tokens, request.lengths, caches, **how)
    state = _first(logits, [cache.overflow for cache in caches], request.sampling, request.stops)
    return dataclasses.replace(state, caches=caches)


@jax.jit
def _first(logits: jax.Array, overflow: list[jax.Array], sampling: Sampling | None, stops: Stops) -> DecodeState:
    """The state, but for the caches, after the prompts' logits [B, V] and their caches' flags [B]."""
    never = jnp.zeros(len(logits), bool)
    state = DecodeState(jnp.zeros(len(logits), jnp.int32), never, never, jnp.int32(0), ())
    return _advanced(state, logits, overflow, sampling, stops)


def _steps(model: Model, request: Request) -> Generator[np.ndarray, None, np.ndarray]:
    """What `stream` yields and returns."""
    state = _start(model, request)
    token, finished = jax.device_get((state.token, state.finished))
    yield token  # before the step is compiled
    if request.max_new_tokens == 1 or finished.all():
        return jax.device_get(state.overflow)
    # Flattened once, not in every step: of 32 layers that takes 2.5 ms.
    leaves, structure = jax.tree.flatten(model)
    step = functools.partial(_stream_step, leaves, structure=structure, implementation=request.implementation)
    state, shown = step(state, request.sampling, request.stops)
    for _ in range(request.max_new_tokens - 2):
        # The next step is on its way to the device before the host waits for this one's tokens.
        state, coming = step(state, request.sampling, request.stops)
        token, finished = jax.device_get(shown)
        yield token
        if finished:
            return jax.device_get(state.overflow)
        shown = coming
    yield jax.device_get(shown[0])
    return jax.device_get(state.overflow)


@functools.partial(jax.jit, static_argnames=("structure", "implementation"), donate_argnames="state")
def _stream_step(
    leaves: list[Any],
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    structure: Any,
    implementation: Implementation,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
    """The next state of the model that is given by leaves and their structure; and what the host looks at.

    That is not donated with the state: the tokens, and whether all have stopped.
    """
    state = _step(jax.tree.unflatten(structure, leaves), state, sampling, stops, implementation)
    return state, (state.token, state.finished.all())


def _step(
    model: Model, state: DecodeState, sampling: Sampling | None, stops: Stops, implementation: Implementation
) -> DecodeState:
    """The next token of every sequence."""
    logits, caches = decode_step(model, state.token, state.caches, implementation=implementation)
    state = _advanced(state, logits, [cache.overflow for cache in caches], sampling, stops)
    return dataclasses.replace(state, caches=caches)


def _advanced(
    state: DecodeState, logits: jax.Array, overflow: list[jax.Array], sampling: Sampling | None, stops: Stops
) -> DecodeState:
    """The state with one more token of every sequence, 0 for those that have stopped; with the caches that it had.

    Args:
        state: before.
        logits: float32 [B, V], of the token to come.
        overflow: bool [B] each, whether something of a sequence did not fit in a layer's cache.
        sampling, stops: as in `Request`.
    """
    token = jnp.where(state.finished, 0, choose(logits, sampling, stops, state.step))
    # What a cache is given of a sequence that has stopped is no token of it.
    lost = functools.reduce(jnp.logical_or, overflow, jnp.zeros_like(state.overflow)) & ~state.finished
    finished = state.finished | is_stop(token, stops)
    return DecodeState(token, finished, state.overflow | lost, state.step + 1, state.caches)


@functools.partial(jax.jit, static_argnames=("implementation", "max_new_tokens"), donate_argnames="state")
def _decode_loop(
    model: Model,
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    implementation: Implementation,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array, DecodeState]:
    """All steps on the device: tokens [B, max_new_tokens], their counts [B], and the state, which was donated."""
    batch = state.token.shape[0]
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(state.token)
    Carry = tuple[DecodeState, jax.Array, jax.Array]  # noqa: N806
    checks = -(-(max_new_tokens - 1) // STEPS_PER_CHECK)
    steps = -(-(max_new_tokens - 1) // max(checks, 1))  # a few more in all, perhaps: all have stopped then

    def unfinished(carry: Carry) -> jax.Array:
        state, _, _ = carry
        return (state.step < max_new_tokens) & ~state.finished.all()

    def advance(_: jax.Array, carry: Carry) -> Carry:
        state, written, count = carry
        new = _step(model, state, sampling, stops, implementation)
        written = written.at[:, state.step].set(new.token, mode="drop")
        finished = new.finished | (new.step >= max_new_tokens)
        return dataclasses.replace(new, finished=finished), written, count + (~state.finished).astype(jnp.int32)

    start = (state, written, jnp.ones(batch, jnp.int32))
    state, written, count = lax.while_loop(unfinished, lambda carry: lax.fori_loop(0, steps, advance, carry), start)
    return written, count, state
