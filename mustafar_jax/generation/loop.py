"""Text from a model through its layers' caches: jit-compiled prefill and decode, sampling, streaming."""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import not_finite
from mustafar_jax.generation.mesh import automatic, each_automatic, everywhere, fetch, to_auto, to_caller
from mustafar_jax.generation.programs import last_programs
from mustafar_jax.generation.protocols import Caches, Model, Progress
from mustafar_jax.generation.request import Request, check_request
from mustafar_jax.generation.sampling import Sampling, Stops
from mustafar_jax.generation.state import DecodeState, Shown, advance, shown, start

STEPS_PER_CHECK = 16
"""Steps that `generate` takes between looks at whether all sequences have stopped: on a GPU the host waits to look."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "lengths", "overflow", "finite", "caches"], meta_fields=[]
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
        caches: where `capacity` or `caches` was given, one per layer, with the prompts and all of `tokens` up to
            `lengths`, each once: a prompt of a later call stands right after them. None elsewhere.
    """

    tokens: jax.Array
    lengths: jax.Array
    overflow: jax.Array
    finite: jax.Array
    caches: Caches | None = None


def generate(
    model: Model,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | Sequence[int] | None = None,
    config: CompressionConfig | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    min_new_tokens: int = 0,
    implementation: Implementation = None,
    progress: Progress | None = None,
    padding: bool = True,
    capacity: int | None = None,
    caches: Caches | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continue a batch of prompts.

    Args:
        model: the model; a Flax NNX model of `mustafar_jax.models`, or any pytree with the methods of `Model`.
        tokens: int [B, S], the prompts, padded on the right.
        max_new_tokens: tokens to generate at most.
        lengths: int [B], the prompts' own lengths, 1 .. S; S if None.
        config: how the caches are compressed; if None, as `caches` are, and without these not at all.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        top_k: draw from this many of the likeliest tokens; all if None.
        top_p: draw from the fewest likeliest tokens whose probabilities, among those of `top_k`, reach this sum.
        min_p: draw from tokens that are at least this times as probable as the likeliest, 0 .. 1. Like the two before,
            it needs a temperature. All three look at probabilities with the temperature in them.
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
        capacity: tokens that the caches have room for, all turns of a conversation together; they are then given back,
            and `padding` leaves them alone. Calls of one capacity share their programs.
        caches: what an earlier call gave back. The prompts continue those sequences, each from where it ends. They are
            donated, so this call's replace them.
        mesh: the devices that caches are spread over, which must be those of the weights (`models.load(mesh=)`); that
            is where they are spread if None, too.

    Raises:
        ValueError: an argument out of its range, an empty prompt, a (padded) prompt and max_new_tokens that together
            exceed the model's context, or the room in the caches; caches of a model of another shape, of another batch,
            config or dtype, and such as were donated before; a mesh that is not that of the weights, or that the batch
            or the config's rules cannot be split over.
        TypeError: an argument of another type, such as a path in place of a model, or text in place of tokens; a model
            whose layers cannot `extend`, where caches are to be kept.
        NotImplementedError: no implementation that was named can attend the caches. Like the others, before any work.
    """
    with automatic():
        model, key, caches = to_auto((model, key, caches))
        request = check_request(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            lengths=lengths,
            config=config,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            key=key,
            eos_id=eos_id,
            min_new_tokens=min_new_tokens,
            implementation=implementation,
            progress=progress,
            padding=padding,
            capacity=capacity,
            caches=caches,
            mesh=mesh,
        )
        state, _ = start(model, request)
        how = {"implementation": request.implementation, "max_new_tokens": request.max_new_tokens, "keep": request.keep}
        written, state = _decode_loop(model, state, request.sampling, request.stops, **how)
    return to_caller(_generation(request, written, state))


def stream(
    model: Model,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | Sequence[int] | None = None,
    config: CompressionConfig | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    key: jax.Array | None = None,
    eos_id: int | Sequence[int] | None = None,
    min_new_tokens: int = 0,
    implementation: Implementation = None,
    progress: Progress | None = None,
    padding: bool = True,
    capacity: int | None = None,
    caches: Caches | None = None,
    mesh: Mesh | None = None,
) -> Generator[np.ndarray, bool | None, Generation]:
    """Continue a batch of prompts, yielding each step's tokens, int32 [B], as they come.

    Arguments, errors and tokens are those of `generate`; the stream ends when every sequence has stopped, or when it is
    told to by `send(True)` after a step: what was yielded is then all. What the generator returns, its StopIteration's
    value, is the `Generation`.

    Raises:
        ValueError: also where no sequence had logits that are finite to its end, when the stream ends.
    """
    with automatic():
        model, key, caches = to_auto((model, key, caches))
        request = check_request(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            lengths=lengths,
            config=config,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            key=key,
            eos_id=eos_id,
            min_new_tokens=min_new_tokens,
            implementation=implementation,
            progress=progress,
            padding=padding,
            capacity=capacity,
            caches=caches,
            mesh=mesh,
        )
    return each_automatic(_steps(model, request))


def _generation(request: Request, tokens: jax.Array, state: DecodeState) -> Generation:
    caches = state.caches if request.keep else None
    told = tokens, state.lengths, state.overflow, state.finite
    return Generation(*everywhere(told, request.sharding), caches)


def _steps(model: Model, request: Request) -> Generator[np.ndarray, bool | None, Generation]:
    """What `stream` yields and returns."""
    written: list[np.ndarray] = []
    stopped = False
    for latest, looked_at in _states(model, request):
        state = latest
        token, wrote, finished = fetch(looked_at, request.sharding)
        if wrote:
            written.append(token)
            stopped = bool((yield token))
        if finished or stopped:
            break
    tokens = np.zeros((len(request.tokens), request.max_new_tokens), np.int32)
    if written:
        tokens[:, : len(written)] = np.stack(written, axis=1)
    seen = jax.device_put(np.int32(len(written)))
    state = dataclasses.replace(state, lengths=jnp.minimum(state.lengths, seen))  # it may be a token ahead
    end = _generation(request, jax.device_put(tokens), state)
    finite, lengths = fetch((end.finite, end.lengths), request.sharding)
    if not stopped and not finite.any():
        steps = {f"sequence {row}": length + 1 for row, length in enumerate(lengths.tolist())}
        raise ValueError(not_finite(model, steps))
    return end


def _states(model: Model, request: Request) -> Iterator[tuple[DecodeState, Shown]]:
    """States of a generation, and what the host looks at: the tokens that come before them, or their own.

    The next step is then on its way. So where caches are to be kept, a state's hold what the host has seen up to then.
    Where they are not, the first tokens come before the step is compiled, and the last ones without a step after them.
    """
    state, seen = start(model, request)
    if not request.keep:
        yield state, seen
    steps = request.max_new_tokens - (0 if request.keep else 1)
    if not steps:
        return
    # Flattened once, not in every step: of 32 layers that takes 2.5 ms.
    leaves, structure = jax.tree.flatten(model)
    how = {"structure": structure, "implementation": request.implementation, "keep": request.keep}
    compiled = _stream_step.of(leaves, state, request.sampling, request.stops, **how)
    step = functools.partial(compiled, leaves, **how)
    for number in range(steps):
        state, coming = step(state, request.sampling, request.stops)
        if request.keep or number:
            yield state, seen
        seen = coming
    if not request.keep:
        yield state, seen


@last_programs(static_argnames=("structure", "implementation", "keep"), donate_argnames="state")
def _stream_step(
    leaves: list[Any],
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    *,
    structure: Any,
    implementation: Implementation,
    keep: bool,
) -> tuple[DecodeState, Shown]:
    """The next state of the model that is given by leaves and their structure; and what is not donated with it."""
    model: Model = jax.tree.unflatten(structure, leaves)
    state = advance(model, state, sampling, stops, implementation=implementation, keep=keep)
    return state, shown(state)


@last_programs(static_argnames=("implementation", "max_new_tokens", "keep"), donate_argnames="state")
def _decode_loop(
    model: Model,
    state: DecodeState,
    sampling: Sampling | None,
    stops: Stops,
    *,
    implementation: Implementation,
    max_new_tokens: int,
    keep: bool,
) -> tuple[jax.Array, DecodeState]:
    """All steps on the device: tokens [B, max_new_tokens], and the state, which was donated.

    Where caches are to be kept, it takes one step more, in which the last tokens pass the model.
    """
    batch = state.token.shape[0]
    written = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(state.token)
    Carry = tuple[DecodeState, jax.Array]  # noqa: N806
    wanted = max_new_tokens - (0 if keep else 1)
    checks = -(-wanted // STEPS_PER_CHECK)
    steps = -(-wanted // max(checks, 1))  # a few more in all, perhaps: all have stopped then

    def unfinished(carry: Carry) -> jax.Array:
        state, _ = carry
        return state.pending.any() if keep else ~state.finished.all()

    def take_step(_: jax.Array, carry: Carry) -> Carry:
        state, written = carry
        new = advance(model, state, sampling, stops, implementation=implementation, keep=keep)
        return new, written.at[:, state.step].set(new.token, mode="drop")

    first = (state, written)
    state, written = lax.while_loop(unfinished, lambda carry: lax.fori_loop(0, steps, take_step, carry), first)
    return written, state
