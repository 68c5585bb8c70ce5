"""What a model predicts of a given continuation, when the prompt before it lies in a compressed cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.programs import last_programs
from mustafar_jax.generation.scoring import by_blocks, forced_states

TOKENS = 256
"""Tokens whose logits over the whole vocabulary are held at once."""


class Scores(NamedTuple):
    """Predictions of each token [B, n] of a continuation, float32 unless said.

    Attributes:
        loss: negative log-likelihood, nats.
        dense_loss: the same through a dense cache.
        kl: the divergence of the prediction from that through a dense cache, nats.
        best: bool, whether the token is the likeliest one.
        agrees: bool, whether the likeliest token is the one through a dense cache.
    """

    loss: jax.Array
    dense_loss: jax.Array
    kl: jax.Array
    best: jax.Array
    agrees: jax.Array


def empty_cache(
    model: Any, config: CompressionConfig, *, batch: int, capacity: int, dtype: DTypeLike | None = None
) -> LayerCache:
    """One layer's empty cache, of the model's dtype if None; `prefill` is to fill it, since it holds zeros alone."""
    init = functools.partial(model.init_cache, config, batch=batch, capacity=capacity, dtype=dtype)
    # Of the caches of all layers, one is needed at a time: take its shapes.
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init)[0])


def hidden_states(
    model: Any,
    configs: Sequence[CompressionConfig],
    prompt: np.ndarray,
    lengths: np.ndarray,
    continuation: np.ndarray,
    progress: Callable[[float], object] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[jax.Array]:
    """Hidden states [B, n, D] from which the tokens of a continuation are predicted, through a cache of each config.

    Args:
        model: a model of `mustafar_jax.models`, whose layers have `run_prompt` and `extend`.
        configs: how caches are compressed.
        prompt: int32 [B, S], padded on the right; prefilled.
        lengths: int32 [B], the prompts' own.
        continuation: int32 [B, n]; each token is appended to the cache, whatever the model would have written.
        progress: called with the share of layers that is done, after each.
        names: of the rows, for errors; their numbers if None.

    Raises:
        ValueError: where a value's entries did not fit their slots in a cache, naming the rows.
    """
    batch, capacity = len(prompt), prompt.shape[1] + continuation.shape[1] - 1

    def empty(config: CompressionConfig, _: int) -> LayerCache:
        return empty_cache(model, config, batch=batch, capacity=capacity)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done / total)

    given = jnp.asarray(prompt), jnp.asarray(lengths), jnp.asarray(continuation)
    makers = [functools.partial(empty, config) for config in configs]
    states, overflow = forced_states(model, makers, *given, by_blocks, report)
    for config, over in zip(configs, overflow, strict=True):
        check_fits(config, over, range(batch) if names is None else names)
    return states


def check_fits(config: CompressionConfig, overflow: ArrayLike, names: Sequence[object]) -> None:
    """Raise ValueError with the names of the rows for which `overflow` [B] is set."""
    over = [name for name, flag in zip(names, np.asarray(overflow), strict=True) if flag]
    if over:
        raise ValueError(f"{config}: a packed value needs more entries than its slots hold, in rows {over}")


@last_programs()
def compare(model: Any, dense: jax.Array, compressed: Sequence[jax.Array], continuation: jax.Array) -> list[Scores]:
    """Score the tokens [B, n] of a continuation, given hidden states [B, n, D] through a dense cache and others.

    Returns `Scores` for each of the others.
    """
    count, size = len(compressed), continuation.size
    blocks = -(-size // TOKENS)

    def in_blocks(x: jax.Array) -> jax.Array:
        """[B, n, ...] -> [blocks, TOKENS, ...], padded with zeros."""
        x = x.reshape(size, *x.shape[2:])
        return jnp.pad(x, [(0, blocks * TOKENS - size), *[(0, 0)] * (x.ndim - 1)]).reshape(blocks, TOKENS, *x.shape[1:])

    def score(block: tuple[jax.Array, jax.Array, jax.Array]) -> Scores:
        dense, compressed, target = block
        expected = jax.nn.log_softmax(model.logits(dense))

        def score_one(hidden: jax.Array) -> Scores:
            predicted = jax.nn.log_softmax(model.logits(hidden))
            loss, dense_loss = (-jnp.take_along_axis(x, target[:, None], axis=1)[:, 0] for x in (predicted, expected))
            kl = jnp.sum(jnp.exp(expected) * (expected - predicted), axis=1)
            best, dense_best = (jnp.argmax(x, axis=1) for x in (predicted, expected))
            return Scores(loss, dense_loss, kl, best == target, best == dense_best)

        return lax.map(score_one, compressed)

    others = jnp.stack([in_blocks(hidden) for hidden in compressed], axis=1)
    scores = lax.map(score, (in_blocks(dense), others, in_blocks(continuation)))  # [blocks, count, TOKENS] each

    def of(leaf: jax.Array, i: int) -> jax.Array:
        return leaf[:, i].reshape(-1)[:size].reshape(continuation.shape)

    return [Scores(*(of(leaf, i) for leaf in scores)) for i in range(count)]
