"""Text from a model through its layers' caches: jit-compiled prefill and decode, sampling, streaming."""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import not_finite
from mustafar_jax.generation.mesh import automatic, each_automatic, to_auto, to_caller
from mustafar_jax.generation.prefill import prefill_prompt
from mustafar_jax.generation.programs import last_programs
from mustafar_jax.generation.protocols import Caches, Model, Progress
from mustafar_jax.generation.request import Request, check_request
from mustafar_jax.generation.sampling import Sampling, Stops, choose, is_stop

STEPS_PER_CHECK = 16
"""Steps that `generate` takes between looks at whether all sequences have stopped: on a GPU the host waits to look."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "lengths", "overflow", "finite"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns. A pytree.

    Attributes:
        tokens: int32 [B, max_new_tokens]; 0 after a stop token.
        lengths: int32 [B], tokens up to and with the stop token, or max_new_tokens.
        overflow: bool [B], whether a value of the sequence, in any layer's cache, needed more than `config.v_slots`:
            what did not fit was missing from then on.
        finite: bool [B], whether the model gave the sequence logits to choose each token from. Where they were NaN, or
            the largest was infinite, the sequence ended without that token: `lengths` says after how many, and 0 stands
            in `tokens` from there on. The other sequences go on. Numbers that overflow float16 do this, for example.
    """

    tokens: jax.Array
    lengths: jax.Array
    overflow: jax.Array
    finite: jax.Array


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
    padding: bool = True,
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
        padding: pad the prompts, and give the caches room, for the next of 64, 96, 128, 192, 256, ... tokens, within
            the model's context. So requests of other lengths find the programs of earlier ones compiled; the tokens
            are the same. False takes the memory and the time of the tokens that there are, and compiles for each
            length. Either way the programs of the last 16 shapes are kept.

    Raises:
        ValueError: an argument out of its range, an empty prompt, a (padded) prompt and max_new_tokens that together
            exceed the model's context.
        TypeError: an argument of another type, such as a path in place of a model, or text in place of tokens.
        NotImplementedError: no implementation that was named can attend the caches. Like the others, before any work.
    """
    with automatic():
        model, key = to_auto((model, key))
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
            padding=padding,
        )
        state, _ = _start(model, request)
        how = {"implementation": request.implementation, "max_new_tokens": request.max_new_tokens}
        written, state = _decode_loop(model, state, request.sampling, request.stops, **how)
    return to_caller(Generation(written, state.lengths, state.overflow, state.finite))


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
    padding: bool = True,
) -> Generator[np.ndarray, None, Generation]:
    """Continue a batch of prompts, yielding each step's tokens, int32 [B], as they come.

    Arguments, errors and tokens are those of `generate`; the stream ends when every sequence has stopped. What the
    generator returns then, its StopIteration's value, is the `Generation`.

    Raises:
        ValueError: also where no sequence had logits that are finite to its end, when the stream ends.
    """
    with automatic():
        model, key = to_auto((model, key))
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
            padding=padding,
        )
    return each_automatic(_steps(model, request))


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


Shown = tuple[jax.Array, jax.Array, jax.Array]
"""What the host looks at after a step: tokens, int32 [B]; whether any sequence got one; whether all have stopped."""


def _start(model: Model, request: Request) -> tuple[DecodeState, Shown]:
    """Prefill, and choose the first token."""
    caches = model.init_cache(request.config, batch=len(request.tokens), capacity=request.capacity)
    how: dict[str, Any] = {"implementation": request.implementation, "progress": request.progress}
    logits, caches = prefill_prompt(model, request.tokens, request.lengths, caches, **how)
    state, shown = _first(logits, [cache.overflow for cache in caches], request.sampling, request.stops)
    return dataclasses.replace(state, caches=caches), shown


@jax.jit
def _first(
    logits: jax.Array, overflow: list[jax.Array], sampling: Sampling | None, stops: Stops
) -> tuple[DecodeState, Shown]:
    """The state, but for the caches, after the prompts' logits [B, V] and their caches' flags [B]."""
    zeros, never = jnp.zeros(len(logits), jnp.int32), jnp.zeros(len(logits), bool)
    state = DecodeState(zeros, never, zeros, ~never, never, jnp.int32(0), ())
    state = _advanced(state, logits, overflow, sampling, stops)
    return state, _shown(state)


def _steps(model: Model, request: Request) -> Generator[np.ndarray, None, Generation]:
    """What `stream` yields and returns."""
    written: list[np.ndarray] = []
    for latest, shown in _states(model, request):
        state = latest
        token, wrote, finished = jax.device_get(shown)
        if wrote:
            written.append(token)
            yield token
        if finished:
            break
    tokens = np.zeros((len(request.tokens), request.max_new_tokens), np.int32)
    if written:
        tokens[:, : len(written)] = np.stack(written, axis=1)
    end = Generation(jax.device_put(tokens), state.lengths, state.overflow, state.finite)
    if not jax.device_get(end.finite).any():
        lengths = jax.device_get(end.lengths).tolist()
        raise ValueError(not_finite(model, {f"sequence {row}": length + 1 for row, length in enumerate(lengths)}))
    return end


def _states(model: Model, request: Request) -> Iterator[tuple[DecodeState, Shown]]:
    """The states of a generation and what the host looks at; all but the first when the next is on its way."""
    state, shown = _start(model, request)
    yield state, shown  # before the step is compiled
    if request.max_new_tokens == 1:
        return
    # Flattened once, not in every step: of 32 layers that takes 2.5 ms.
    leaves, structure = jax.tree.flatten(model)
    how = {"structure": structure, "implementation": request.implementation}
    compiled = _stream_step.of(leaves, state, request.sampling, request.stops, **how)
    step = functools.partial(compiled, leaves, **how)
    state, shown = step(state, request.sampling, request.stops)
    for _ in range(request.max_new_tokens - 2):
        state, coming = step(state, request.sampling, request.stops)
        yield state, shown
        shown = coming
    yield state, shown


@last_programs(static_argnames=("structure", "implementation"), donate_argnames="state")
def _stream_step(
    leaves: list[Any],
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    *,
    structure: Any,
    implementation: Implementation,
) -> tuple[DecodeState, Shown]:
    """The next state of the model that is given by leaves and their structure; and what is not donated with it."""
    state = _step(jax.tree.unflatten(structure, leaves), state, sampling, stops, implementation)
    return state, _shown(state)


def _shown(state: DecodeState) -> Shown:
    return state.token, (state.lengths == state.step).any(), state.finished.all()


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
    """The state with one more token of every sequence that has not stopped, 0 for the others; with its old caches.

    Args:
        state: before.
        logits: float32 [B, V], of the token to come. A sequence stops where there is none to be chosen.
        overflow: bool [B] each, whether something of a sequence did not fit in a layer's cache.
        sampling, stops: as in `Request`.
    """
    is_finite = jnp.isfinite(logits.max(axis=-1))  # a model may give some tokens -inf
    writes = ~state.finished & is_finite
    token = jnp.where(writes, choose(logits, sampling, stops, state.step), 0)
    # What a cache is given of a sequence that has stopped is no token of it.
    lost = functools.reduce(jnp.logical_or, overflow, jnp.zeros_like(state.overflow)) & ~state.finished
    return DecodeState(
        token=token,
        finished=~writes | is_stop(token, stops),
        lengths=state.lengths + writes.astype(jnp.int32),
        finite=state.finite & (state.finished | is_finite),
        overflow=state.overflow | lost,
        step=state.step + 1,
        caches=state.caches,
    )


@last_programs(static_argnames=("implementation", "max_new_tokens"), donate_argnames="state")
def _decode_loop(
    model: Model,
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    *,
    implementation: Implementation,
    max_new_tokens: int,
) -> tuple[jax.Array, DecodeState]:
    """All steps on the device: tokens [B, max_new_tokens], and the state, which was donated."""
    batch = state.token.shape[0]
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(state.token)
    Carry = tuple[DecodeState, jax.Array]  # noqa: N806
    checks = -(-(max_new_tokens - 1) // STEPS_PER_CHECK)
    steps = -(-(max_new_tokens - 1) // max(checks, 1))  # a few more in all, perhaps: all have stopped then

    def unfinished(carry: Carry) -> jax.Array:
        state, _ = carry
        return (state.step < max_new_tokens) & ~state.finished.all()

    def advance(_: jax.Array, carry: Carry) -> Carry:
        state, written = carry
        new = _step(model, state, sampling, stops, implementation)
        written = written.at[:, state.step].set(new.token, mode="drop")
        return dataclasses.replace(new, finished=new.finished | (new.step >= max_new_tokens)), written

    start = (state, written)
    state, written = lax.while_loop(unfinished, lambda carry: lax.fori_loop(0, steps, advance, carry), start)
    return written, state
