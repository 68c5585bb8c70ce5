"""Text from a model through its layers' caches: jit-compiled prefill and decode, sampling, streaming."""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Implementation, Names, check_implementation
from mustafar_jax.cache import LayerCache
from mustafar_jax.cache.checks import check_lengths
from mustafar_jax.config import CompressionConfig

Caches = tuple[LayerCache, ...]
Progress = Callable[[int, int], object]

DENSE = CompressionConfig(k_sparsity=0, v_sparsity=0)
"""The config of an ordinary dense cache, the baseline of every comparison."""

STEPS_PER_CHECK = 16
"""Steps that `generate` takes between looks at whether all sequences have stopped: on a GPU the host waits to look."""

PREFILL_TOKENS = 65536
"""Tokens of a batch of prompts that are prefilled at a time, in whole prompts: what a layer makes of them is held."""


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


class Model(Protocol):
    """What generation needs of a language model; a pytree, such as a Flax NNX module."""

    @property
    def config(self) -> Any:
        """The model's shape: vocab_size and max_position_embeddings are read."""

    @property
    def layers(self) -> Iterable[Layer]:
        """The decoder layers, all of one structure, so that a function jitted over one compiles once."""

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> hidden [..., D]."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden [..., D] -> float32 [..., V]."""

    def init_cache(self, config: CompressionConfig, *, batch: int, capacity: int) -> Caches:
        """One empty cache per layer."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: int32 [B, max_new_tokens]; 0 after a stop token.
        lengths: int32 [B], tokens up to and with the stop token, or max_new_tokens.
        overflow: bool [B], whether a value of the sequence, in any layer's cache, needed more than `config.v_slots`:
            what did not fit was missing from then on.
    """

    tokens: jax.Array
    lengths: jax.Array
    overflow: jax.Array


class Sampling(NamedTuple):
    """How a token is drawn: a key, and temperature and top_p as scalars, so that new values compile nothing anew."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array


class Stops(NamedTuple):
    """What ends a sequence: tokens, int32 [n], and int32, how many tokens come before one of them can."""

    tokens: jax.Array
    earliest: jax.Array


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
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum.
        key: a `jax.random.key`, needed where temperature > 0. Each step and each row of the batch draws with its own.
        eos_id: the token, or tokens, that end a sequence; if None, none does.
        min_new_tokens: tokens of a sequence before which none of `eos_id` is written, 0 .. max_new_tokens.
        implementation: of attention on caches, as in `decode_attention`, and of packing, by those of the names that
            pack ("triton", "xla"): "xla" is XLA for both. Where none of the names packs, the best that works here
            does. Attention over the prompts is dense and always the best that works here.
        progress: called as progress(done, total) after each layer of the prefill.

    Raises:
        ValueError: an argument out of its range, an empty prompt, a (padded) prompt and max_new_tokens that together
            exceed the model's context; before any work is done.
        NotImplementedError: no implementation that was named can attend the caches; before any work is done.
    """
    sampling = _check_sampling(temperature, top_p, key)
    stops = _check_stops(eos_id, min_new_tokens, max_new_tokens)
    request = _check_request(model, tokens, lengths, max_new_tokens, config, sampling, stops, implementation)
    state = _start(model, request, progress)
    written, count, state = _decode_loop(model, state, sampling, stops, request.implementation, request.max_new_tokens)
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
    sampling = _check_sampling(temperature, top_p, key)
    stops = _check_stops(eos_id, min_new_tokens, max_new_tokens)
    request = _check_request(model, tokens, lengths, max_new_tokens, config, sampling, stops, implementation)
    return _steps(model, request, progress)


def log_likelihoods(
    model: Model,
    tokens: ArrayLike,
    *,
    prompt_length: int,
    config: CompressionConfig | None = None,
    implementation: Implementation = None,
    progress: Progress | None = None,
) -> jax.Array:
    """How likely a text is, token by token, when its beginning is the prompt and the rest is decoded through the cache.

    Args:
        model: as in `generate`.
        tokens: int [B, S], texts of one length.
        prompt_length: tokens that are prefilled, 1 .. S - 1; the others are appended one by one, whatever the model
            would have written.
        config, implementation, progress: as in `generate`.

    Returns:
        float32 [B, S - prompt_length], the natural logarithm of each token's probability after those before it.

    Raises:
        ValueError: as `generate` does, and a prompt_length outside its range; after the work, where values of a text
            needed more than `config.v_slots`.
        NotImplementedError: as `generate` does.
    """
    tokens = _check_tokens(model, tokens)
    batch, length = tokens.shape
    if length < 2:
        raise ValueError(f"tokens has shape {tokens.shape}; wanted at least two tokens per text")
    if not 1 <= prompt_length < length:
        raise ValueError(f"{prompt_length=} must lie in 1 .. {length - 1}, below the {length} tokens of each text")
    context = model.config.max_position_embeddings
    if length > context:
        raise ValueError(f"tokens has shape {tokens.shape}: {length} tokens exceed the model's context of {context}")
    implementation = check_implementation(implementation)
    config = DENSE if config is None else config
    _check_caches(model, config, batch, length, implementation)
    caches = model.init_cache(config, batch=batch, capacity=length)
    lengths = jnp.full(batch, prompt_length, jnp.int32)
    prompt = tokens[:, :prompt_length]
    logits, caches = prefill_prompt(model, prompt, lengths, caches, implementation=implementation, progress=progress)
    # Layer by layer, not token by token: what a layer makes of a token depends on its own cache and the layer below
    # alone, so the numbers are the same, and one layer is compiled, and serves for all.
    hidden, overflow = _embed(model, tokens[:, prompt_length:-1]), jnp.zeros(batch, bool)
    for layer, cache in zip(model.layers, caches, strict=True):
        hidden, cache = _decode_layer(layer, hidden, cache, implementation)
        overflow |= cache.overflow
    if overflow.any():
        texts = np.flatnonzero(overflow).tolist()
        raise ValueError(f"v_slots={config.v_slots} holds fewer entries than values of texts {texts} need")
    return _log_probabilities(model, logits, hidden, tokens[:, prompt_length:])


def prefill_prompt(
    model: Model,
    tokens: jax.Array,
    lengths: jax.Array,
    caches: Caches,
    *,
    implementation: Implementation = None,
    progress: Progress | None = None,
) -> tuple[jax.Array, Caches]:
    """Run prompts through the model, layer by layer, and fill the caches.

    Each layer's keys and values are pruned and packed before the next layer begins, so at most one layer's are held
    dense; and of a large batch of long prompts only some rows go at a time (`PREFILL_TOKENS`). One layer is compiled,
    and serves for all layers and rows.

    Args:
        model: the model.
        tokens: int32 [B, S], padded on the right.
        lengths: int32 [B], valid tokens.
        caches: one empty cache per layer; donated.
        implementation: as in `generate`.
        progress: called as progress(done, total) after each layer of each part of the rows.

    Returns:
        float32 [B, V], the logits after each prompt's last token, and the filled caches.
    """
    batch, length = tokens.shape
    rows = _rows_at_a_time(batch, length)
    # The last part is moved back to end with the batch, so every part has the same shape; to fill a row twice is
    # to replace it by itself.
    starts = [min(start, batch - rows) for start in range(0, batch, rows)]
    filled, logits, done, names = list(caches), [], 0, check_implementation(implementation)
    for start in map(jnp.int32, starts):
        part, valid = (lax.dynamic_slice_in_dim(x, start, rows) for x in (tokens, lengths))
        hidden = _embed(model, part)
        for i, layer in enumerate(model.layers):
            hidden, filled[i] = _prefill_layer(layer, hidden, filled[i], valid, start, names)
            done += 1
            if progress is not None:
                jax.block_until_ready(hidden)
                progress(done, len(starts) * len(filled))
        logits.append(_last_logits(model, hidden, valid))
    if len(starts) == 1:
        return logits[0], tuple(filled)
    return jnp.concatenate([*logits[:-1], logits[-1][-batch % rows :]]), tuple(filled)


def _rows_at_a_time(batch: int, length: int) -> int:
    """How many of a batch's prompts to prefill at a time: as many as `PREFILL_TOKENS` holds, in parts of one size."""
    fit = max(1, PREFILL_TOKENS // length)
    parts = -(-batch // fit)
    return -(-batch // parts)


def prefilled_tokens(batch: int, length: int) -> int:
    """How many tokens of a batch of prompts [B, S] are prefilled at a time, at most; one prompt always goes whole."""
    return min(batch * length, max(PREFILL_TOKENS, length))


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


@dataclasses.dataclass(frozen=True)
class _Request:
    """The checked arguments of a generation."""

    tokens: jax.Array
    lengths: jax.Array
    max_new_tokens: int
    config: CompressionConfig
    sampling: Sampling | None
    stops: Stops
    implementation: Implementation


def _start(model: Model, request: _Request, progress: Progress | None) -> DecodeState:
    """Prefill, and choose the first token."""
    batch, length = request.tokens.shape
    caches = model.init_cache(request.config, batch=batch, capacity=length + request.max_new_tokens)
    how: dict[str, Any] = {"implementation": request.implementation, "progress": progress}
    logits, caches = prefill_prompt(model, request.tokens, request.lengths, caches, **how)
    step = jnp.int32(0)
    token = _choose(logits, request.sampling, request.stops, step)
    return DecodeState(token, _is_stop(token, request.stops), _overflow(caches, batch), step + 1, caches)


def _steps(model: Model, request: _Request, progress: Progress | None) -> Generator[np.ndarray, None, np.ndarray]:
    state = _start(model, request, progress)
    yield np.asarray(state.token)  # before the step is compiled
    if request.max_new_tokens == 1 or state.finished.all():
        return np.asarray(state.overflow)
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
            return np.asarray(state.overflow)
        shown = coming
    yield np.asarray(shown[0])
    return np.asarray(state.overflow)


@functools.partial(jax.jit, static_argnames="implementation", donate_argnames=("hidden", "cache"))
def _prefill_layer(
    layer: Layer,
    hidden: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    start: jax.Array,
    implementation: Implementation,
) -> tuple[jax.Array, LayerCache]:
    """Run prompts [b, S, D] through one layer; they fill the sequences start .. start + b - 1 of its cache."""
    rows = hidden.shape[0]
    if rows == cache.batch:
        return layer.prefill(hidden, cache, lengths, implementation=implementation)
    part = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, rows), cache)
    hidden, part = layer.prefill(hidden, part, lengths, implementation=implementation)
    place = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return hidden, jax.tree.map(place, cache, part)


@jax.jit
def _embed(model: Model, tokens: jax.Array) -> jax.Array:
    return model.embed(tokens)


@jax.jit
def _last_logits(model: Model, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.logits(jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])


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
    """The next token of every sequence; 0 for those that have stopped."""
    logits, caches = decode_step(model, state.token, state.caches, implementation=implementation)
    token = jnp.where(state.finished, 0, _choose(logits, sampling, stops, state.step))
    # What a cache is given of a sequence that has stopped is no token of it.
    overflow = state.overflow | (_overflow(caches, len(token)) & ~state.finished)
    return DecodeState(token, state.finished | _is_stop(token, stops), overflow, state.step + 1, caches)


def _overflow(caches: Caches, batch: int) -> jax.Array:
    """bool [B]: whether something of a sequence did not fit in any of the caches."""
    return functools.reduce(jnp.logical_or, (cache.overflow for cache in caches), jnp.zeros(batch, bool))


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
        return dataclasses.replace(new, finished=finished), written, count + ~state.finished

    start = (state, written, jnp.ones(batch, jnp.int32))
    state, written, count = lax.while_loop(unfinished, lambda carry: lax.fori_loop(0, steps, advance, carry), start)
    return written, count, state


@functools.partial(jax.jit, static_argnames="implementation", donate_argnames="cache")
def _decode_layer(
    layer: Layer, hidden: jax.Array, cache: LayerCache, implementation: Implementation
) -> tuple[jax.Array, LayerCache]:
    """Run tokens [B, n, D] through one layer, one after the other; the cache, which was donated, holds them then."""

    def advance(cache: LayerCache, token: jax.Array) -> tuple[LayerCache, jax.Array]:
        out, cache = layer.decode(token, cache, implementation=implementation)
        return cache, out

    cache, outs = lax.scan(advance, cache, hidden.swapaxes(0, 1))
    return outs.swapaxes(0, 1), cache


@jax.jit
def _log_probabilities(model: Model, logits: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities [B, n] of targets [B, n]: the first under logits [B, V], others after hidden [B, n - 1, D]."""

    def log_probability(logits: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=-1)[:, 0]

    def score(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, target = pair
        return log_probability(model.logits(hidden), target)

    # A few tokens at a time: all their logits at once could take more memory than the model.
    scores = lax.map(score, (hidden.swapaxes(0, 1), targets.T[1:]), batch_size=64)
    return jnp.concatenate([log_probability(logits, targets[:, 0])[:, None], scores.T], axis=1)


def _choose(logits: jax.Array, sampling: Sampling | None, stops: Stops, step: jax.Array) -> jax.Array:
    """float32 [B, V] -> int32 [B]: the likeliest token, or one drawn with a key of this step and each row."""
    too_early = (step < stops.earliest) & _is_stop(jnp.arange(logits.shape[-1]), stops)
    logits = jnp.where(too_early, -jnp.inf, logits)
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The likeliest token's logit is 0, so that no temperature, however low, makes infinity of it.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    logits = _nucleus(logits, sampling.top_p)
    key = jax.random.fold_in(sampling.key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf at all but the fewest likeliest tokens whose probabilities sum to at least top_p."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    kept = (before < top_p).at[:, 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def _is_stop(token: jax.Array, stops: Stops) -> jax.Array:
    return (token[:, None] == stops.tokens).any(axis=-1)


def _check_request(
    model: Model,
    tokens: ArrayLike,
    lengths: ArrayLike | Sequence[int] | None,
    max_new_tokens: int,
    config: CompressionConfig | None,
    sampling: Sampling | None,
    stops: Stops,
    implementation: Implementation,
) -> _Request:
    tokens = _check_tokens(model, tokens)
    batch, length = tokens.shape
    context = model.config.max_position_embeddings
    if length + max_new_tokens > context:
        raise ValueError(
            f"{length} tokens of prompt and {max_new_tokens=} exceed the model's context of {context}; "
            f"tokens has shape {tokens.shape}, padding included"
        )
    valid = check_lengths(lengths, batch, length, shortest=1)
    config = DENSE if config is None else config
    names = check_implementation(implementation)
    _check_caches(model, config, batch, length + max_new_tokens, names)
    return _Request(tokens, valid, max_new_tokens, config, sampling, stops, names)


def _check_caches(model: Model, config: CompressionConfig, batch: int, capacity: int, names: Names | None) -> None:
    """Raise what the model's caches, or attention on them, would: that shows in tracing, and nothing is allocated."""
    caches = jax.eval_shape(functools.partial(model.init_cache, config, batch=batch, capacity=capacity))
    if names is not None:  # the best that works does work
        hidden = jax.eval_shape(model.embed, jax.ShapeDtypeStruct((batch,), jnp.int32))
        jax.eval_shape(functools.partial(next(iter(model.layers)).decode, implementation=names), hidden, caches[0])


def _check_tokens(model: Model, tokens: ArrayLike) -> jax.Array:
    if isinstance(tokens, Mapping):
        raise ValueError(f"tokens is a {type(tokens).__name__}; wanted integers [B, S], such as its 'input_ids'")
    try:
        given = np.asarray(tokens)
    except ValueError as error:
        raise ValueError("tokens has rows of several lengths; wanted [B, S]: pad them, and pass lengths") from error
    if given.ndim != 2 or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"tokens is {given.dtype}{list(given.shape)}; wanted integers [B, S]")
    if given.size == 0:
        raise ValueError(f"tokens has shape {given.shape}: an empty prompt; wanted at least one token per sequence")
    if given.min() < 0 or given.max() >= model.config.vocab_size:
        raise ValueError(
            f"tokens holds {given.min()} .. {given.max()}; the vocabulary is 0 .. {model.config.vocab_size - 1}"
        )
    return jnp.asarray(given, jnp.int32)


def _check_sampling(temperature: float, top_p: float, key: Any) -> Sampling | None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{temperature=} must be finite and at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]")
    if temperature == 0:
        return None
    if key is None:
        raise ValueError(f"key=None: {temperature=} draws tokens at random, which needs a jax.random.key")
    if not isinstance(key, jax.Array) or key.shape != () or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        given = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
        raise ValueError(f"key is {given}; wanted one jax.random.key")
    # XLA takes subnormal numbers for 0.
    temperature = max(temperature, float(jnp.finfo(jnp.float32).tiny))
    return Sampling(key, jnp.float32(temperature), jnp.float32(top_p))


def _check_stops(eos_id: int | Sequence[int] | None, min_new_tokens: Any, max_new_tokens: Any) -> Stops:
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be an integer of at least 1")
    if not isinstance(min_new_tokens, int | np.integer) or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"{min_new_tokens=} must be an integer in 0 .. {max_new_tokens=}")
    given = np.atleast_1d(() if eos_id is None else eos_id)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(f"{eos_id=} must be an integer, a sequence of integers, or None")
    if given.size and not 0 <= given.min() <= given.max() < 2**31:
        raise ValueError(f"{eos_id=} must hold tokens, 0 .. 2**31 - 1")
    return Stops(jnp.asarray(given, jnp.int32), jnp.int32(min_new_tokens))
