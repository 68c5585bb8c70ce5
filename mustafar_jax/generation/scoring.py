"""Teacher forcing: what a model predicts of given tokens, whatever it would have written."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Implementation, Names
from mustafar_jax.cache import LayerCache, prefill
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import check_flag, check_integer, not_finite
from mustafar_jax.generation.mesh import automatic, new_caches, to_auto, to_caller
from mustafar_jax.generation.prefill import embed, prefill_layer
from mustafar_jax.generation.programs import last_programs, pad_tokens, padded
from mustafar_jax.generation.protocols import BlockLayer, Layer, Model, Progress
from mustafar_jax.generation.request import Texts, check_caches, check_split, check_texts

BLOCK = 32
"""Tokens that `by_blocks` takes at a time; the groups of caches are multiples of it."""

LOGITS = 64
"""Tokens of each text whose logits over the whole vocabulary are held at once."""


def log_likelihoods(
    model: Model,
    tokens: ArrayLike,
    *,
    prompt_length: int,
    config: CompressionConfig | None = None,
    implementation: Implementation = None,
    progress: Progress | None = None,
    padding: bool = True,
) -> jax.Array:
    """How likely a text is, token by token, when its beginning is the prompt and the rest is decoded through the cache.

    Args:
        model: as in `generate`.
        tokens: int [B, S], texts of one length.
        prompt_length: tokens that are prefilled, 1 .. S - 1; the others are appended one by one, whatever the model
            would have written.
        config, implementation: as in `generate`.
        progress: called as progress(done, total) after each layer.
        padding: pad the prompt, what follows it, and the caches, as in `generate`; what pads is not decoded.

    Returns:
        float32 [B, S - prompt_length], the natural logarithm of each token's probability after those before it.

    Raises:
        ValueError, TypeError: as `generate` does, and a prompt_length outside its range; after the work, where values
            of a text needed more than `config.v_slots`, and where the model's logits are not finite, with the texts
            and the steps from which on.
        NotImplementedError: as `generate` does.
    """
    with automatic():
        model = to_auto(model)
        texts = check_texts(model, tokens, config, implementation, progress)
        prompt_length = _check_prompt_length(model, texts, prompt_length)
        found = _score(model, texts, prompt_length, check_flag("padding", padding), progress)
    return to_caller(found)


def _check_prompt_length(model: Model, texts: Texts, prompt_length: Any) -> int:
    """The argument of `log_likelihoods`; ValueError where it and the texts do not go together."""
    prompt_length, length = check_integer("prompt_length", prompt_length), texts.tokens.shape[1]
    if length < 2:
        raise ValueError(f"tokens has shape {texts.tokens.shape}; wanted at least two tokens per text")
    if not 1 <= prompt_length < length:
        raise ValueError(f"{prompt_length=} must lie in 1 .. {length - 1}, below the {length} tokens of each text")
    if length > (context := model.config.max_position_embeddings):
        shape = texts.tokens.shape
        raise ValueError(f"tokens has shape {shape}: {length} tokens exceed the model's context of {context}")
    return prompt_length


def _score(model: Model, texts: Texts, prompt_length: int, padding: bool, progress: Progress | None) -> jax.Array:
    """What `log_likelihoods` returns, with the errors of its caches, and those that show after the work."""
    batch, length = texts.tokens.shape
    capacity = padded(length, model.config.max_position_embeddings) if padding else length
    sharding = check_split(model, None, batch, texts.config)
    check_caches(model, texts, capacity, sharding)
    caches = new_caches(model, texts.config, batch, capacity, sharding)
    given = jax.device_get(texts.tokens)
    parts = given[:, :prompt_length], given[:, prompt_length:]
    prompt, continuation = jax.device_put([pad_tokens(part, capacity) for part in parts] if padding else parts)
    lengths, count = jax.device_put((np.full(batch, prompt_length, np.int32), np.int32(length - prompt_length - 1)))
    how = functools.partial(by_tokens, names=texts.implementation, count=count)
    [hidden], [overflow] = forced_states(model, [caches.__getitem__], prompt, lengths, continuation, how, progress)
    if rows := np.flatnonzero(jax.device_get(overflow)).tolist():
        raise ValueError(f"v_slots={texts.config.v_slots} holds fewer entries than values of texts {rows} need")
    found = jax.device_get(_log_probabilities(model, hidden, continuation))[:, : length - prompt_length]
    unknown = np.isnan(found)
    if broken := {f"text {row}": int(unknown[row].argmax()) + 1 for row in np.flatnonzero(unknown.any(axis=1))}:
        raise ValueError(not_finite(model, broken))
    return jax.device_put(found)


class PassLayer(Protocol):
    """How prompts, and the tokens that are given after them, pass one layer: `by_tokens` or `by_blocks`."""

    def __call__(
        self,
        layer: Any,
        hidden: jax.Array,
        lengths: jax.Array,
        caches: Iterable[LayerCache],
        given: Sequence[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """Fill each of several empty caches with the prompts, and go on through each.

        Args:
            layer: one layer, with the methods that this way needs.
            hidden: [B, S, D], the prompts; donated.
            lengths: int32 [B], their own lengths.
            caches: empty ones, which are asked for one after the other.
            given: for each cache, [B, n, D], the tokens that follow.

        Returns:
            The layer's output for the prompts; for each cache, its output for the tokens that follow, and bool [B],
            whether something of a sequence did not fit in the cache.
        """


def forced_states(
    model: Model,
    empty: Sequence[Callable[[int], LayerCache]],
    prompt: jax.Array,
    lengths: jax.Array,
    continuation: jax.Array,
    pass_layer: PassLayer,
    progress: Progress | None = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states from which each token of a continuation is predicted, through several kinds of caches.

    What a layer makes of a token depends on its own cache and the layer below alone. So all tokens pass one layer
    before any passes the next: one layer is compiled and serves for all, and what is held is one layer's.

    Args:
        model: the model.
        empty: for each kind, what makes the empty cache of a layer, given the layer's number. A cache has room for
            S + n - 1 tokens.
        prompt: int32 [B, S], padded on the right.
        lengths: int32 [B], the prompts' own lengths.
        continuation: int32 [B, n].
        pass_layer: how a layer takes prompts and given tokens.
        progress: called as progress(done, total) after each layer.

    Returns:
        For each kind, [B, n, D], and bool [B], whether something of a sequence did not fit in a cache.
    """
    layers = list(model.layers)
    hidden, given = embed(model, prompt), [_embed_given(model, continuation)] * len(empty)
    overflow = []
    for number, layer in enumerate(layers):
        caches = (make(number) for make in empty)
        hidden, given, over = pass_layer(layer, hidden, lengths, caches, given)
        overflow.append(over)
        if progress is not None:
            jax.block_until_ready(over)
            progress(number + 1, len(layers))
    by_kind = zip(*overflow, strict=True)
    return _predicting(hidden, lengths, given), [functools.reduce(jnp.logical_or, over) for over in by_kind]


@jax.jit
def _embed_given(model: Model, continuation: jax.Array) -> jax.Array:
    """int32 [B, n] -> hidden [B, n - 1, D]: the last token is predicted, and given to no layer."""
    return model.embed(continuation[:, :-1])


@jax.jit
def _predicting(hidden: jax.Array, lengths: jax.Array, given: list[jax.Array]) -> list[jax.Array]:
    """The states [B, n, D] that predict: of prompts [B, S, D] the last, then those of given tokens [B, n - 1, D]."""
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return [jnp.concatenate([last, states], axis=1) for states in given]


def by_tokens(
    layer: Layer,
    hidden: jax.Array,
    lengths: jax.Array,
    caches: Iterable[LayerCache],
    given: Sequence[jax.Array],
    *,
    names: Names | None = None,
    count: jax.Array | None = None,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """A `PassLayer` of any layer, as `generate` would decode: one token at a time, by the implementation `names`.

    Of the tokens that are given, `count` (int32, all if None) are decoded: outputs of what pads them are 0.
    The prompts pass the layer once for each cache, since `Layer.prefill` runs them and fills a cache in one.
    """
    prompts, outs, overflow = hidden, [], []
    for cache, tokens in zip(caches, given, strict=True):
        prompts, filled = prefill_layer(layer, hidden, cache, lengths, names)
        decoded = jax.device_put(np.int32(tokens.shape[1])) if count is None else count
        out, filled = _decode_given(layer, tokens, filled, decoded, names=names)
        outs.append(out)
        overflow.append(filled.overflow)
    return prompts, outs, overflow


@last_programs(static_argnames="names", donate_argnames="cache")
def _decode_given(
    layer: Layer, tokens: jax.Array, cache: LayerCache, count: jax.Array, *, names: Names | None
) -> tuple[jax.Array, LayerCache]:
    """Run the first `count` of tokens [B, n, D] through one layer, one after the other; the cache is donated."""
    Carry = tuple[jax.Array, LayerCache]  # noqa: N806

    def advance(step: jax.Array, carry: Carry) -> Carry:
        outs, cache = carry
        token = lax.dynamic_index_in_dim(tokens, step, axis=1, keepdims=False)
        out, cache = layer.decode(token, cache, implementation=names)
        return lax.dynamic_update_index_in_dim(outs, out, step, axis=1), cache

    if not tokens.shape[1]:  # of no tokens, not even the loop's body could be traced
        return tokens, cache
    return lax.fori_loop(0, count, advance, (jnp.zeros_like(tokens), cache))


def by_blocks(
    layer: BlockLayer,
    hidden: jax.Array,
    lengths: jax.Array,
    caches: Iterable[LayerCache],
    given: Sequence[jax.Array],
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """A `PassLayer` of layers that can `run_prompt` and `extend`: `BLOCK` tokens at a time, as if one by one.

    The prompts pass the layer once for all caches: attention over a prompt is dense, whatever it is held in.
    """
    hidden, *entries = _run_prompt(layer, hidden, lengths)
    ends = [_extend(layer, cache, entries, lengths, tokens) for cache, tokens in zip(caches, given, strict=True)]
    return hidden, [out for out, _ in ends], [over for _, over in ends]


@last_programs(donate_argnames="hidden")
def _run_prompt(
    layer: BlockLayer, hidden: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return layer.run_prompt(hidden, lengths)


@last_programs()
def _extend(
    layer: BlockLayer, cache: LayerCache, entries: Sequence[jax.Array], lengths: jax.Array, given: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Fill a cache with prompts' query, key and value, and run [B, n, D] after them; and whether it overflowed, [B]."""
    query, key, value = entries
    cache, count = prefill(cache, key, value, lengths, query=query), given.shape[1]
    if not count:
        return given, cache.overflow
    before = _until_packing(cache)

    def step(cache: LayerCache, start: jax.Array) -> tuple[LayerCache, jax.Array]:
        one, cache = layer.extend(_taken(given, start, 1), cache, ((start >= 0) & (start < count)).astype(jnp.int32))
        first, end = (jnp.clip(start + ahead, 0, count) for ahead in (1, BLOCK))
        others, cache = layer.extend(_taken(given, first, BLOCK - 1), cache, end - first)
        return cache, jnp.concatenate([one, others], axis=1)

    steps = jnp.arange(-1, -(-count // BLOCK))
    cache, outs = lax.scan(step, cache, before[None] + BLOCK * steps[:, None])  # [steps, B, BLOCK, D]
    token = jnp.arange(count)[None] - before[:, None]
    # Of the first block, which may lack tokens at its beginning, the others stand first.
    place = jnp.where(token < 0, 1 + jnp.arange(count)[None], token % BLOCK)
    return outs[token // BLOCK + 1, jnp.arange(len(given))[:, None], place], cache.overflow


def _until_packing(cache: LayerCache) -> jax.Array:
    """int32 [B], how many tokens come before one that may have a group packed: below `BLOCK`, for groups are multiples.

    Such a token sees the group packed, and those before it as it was. So it goes alone, and the others together.
    """
    config = cache.config
    return (config.sink_tokens + config.residual_length - 1 - cache.lengths) % BLOCK


def _taken(given: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """[B, n, D] -> [B, count, D], of each sequence from another token on; anything where there is none."""
    return jnp.take_along_axis(given, (first[:, None] + jnp.arange(count)[None])[..., None], axis=1, mode="clip")


@last_programs()
def _log_probabilities(model: Model, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities float32 [B, n] of the targets [B, n], each after a hidden state of [B, n, D]."""

    def score(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, target = pair
        logits = jax.nn.log_softmax(model.logits(hidden))
        return jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

    # All logits at once could take more memory than the model.
    return lax.map(score, (hidden.swapaxes(0, 1), targets.T), batch_size=LOGITS).T
