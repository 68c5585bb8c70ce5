"""What a model predicts of a given continuation, when the prompt before it lies in a compressed cache."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig

BLOCK = 32
"""Tokens that a layer takes at once; at most the group of a cache's config."""

TOKENS = 256
"""Tokens whose logits over the whole vocabulary are held at once."""


class CacheKind(Protocol):
    """What caches to measure, if not those of a `CompressionConfig`; hashable."""

    def init_cache(self, model: Any, *, batch: int, capacity: int) -> LayerCache:
        """One layer's empty cache, in which everything is 0."""


Kind = CompressionConfig | CacheKind


class Scores(NamedTuple):
    """Predictions of each token [B, n] of a continuation, all float32 but `best`.

    Attributes:
        loss: negative log-likelihood, nats.
        dense_loss: the same through a dense cache.
        kl: the divergence of the prediction from that through a dense cache, nats.
        best: bool, whether the token is the likeliest one.
    """

    loss: jax.Array
    dense_loss: jax.Array
    kl: jax.Array
    best: jax.Array


def empty_cache(model: Any, kind: Kind, *, batch: int, capacity: int) -> LayerCache:
    """One layer's empty cache."""

    def init() -> LayerCache:
        if isinstance(kind, CompressionConfig):
            return model.init_cache(kind, batch=batch, capacity=capacity)[0]
        return kind.init_cache(model, batch=batch, capacity=capacity)

    # Of the caches of all layers, one is needed at a time: take its shapes, and fill those with the zeros they hold.
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init))


def hidden_states(model: Any, kind: Kind, prompt: np.ndarray, lengths: np.ndarray, continuation: np.ndarray) -> Any:
    """Hidden states [B, n, D] from which the tokens of a continuation are predicted.

    Args:
        model: a model of `mustafar_jax.models`, whose layers have `extend`.
        kind: how caches are compressed.
        prompt: int32 [B, S], padded on the right; prefilled.
        lengths: int32 [B], the prompts' own.
        continuation: int32 [B, n]; each token is appended to the cache, whatever the model would have written.

    Raises:
        ValueError: where a token's entries did not fit their slots in the cache.
    """
    batch, count = continuation.shape
    blocks = -(-(count - 1) // BLOCK)
    following = np.zeros((batch, blocks * BLOCK), np.int32)
    following[:, : count - 1] = continuation[:, :-1]
    capacity = prompt.shape[1] + following.shape[1]
    hidden, after = _embed(model, jnp.asarray(prompt)), _embed(model, jnp.asarray(following))
    overflow = jnp.zeros(batch, bool)
    for layer in model.layers:
        cache = empty_cache(model, kind, batch=batch, capacity=capacity)
        hidden, after, over = _through_layer(layer, cache, hidden, after, jnp.asarray(lengths))
        overflow |= over
    if overflow.any():
        raise ValueError(f"{kind}: a packed value needs more entries than its slots hold")
    last = jnp.take_along_axis(hidden, jnp.asarray(lengths)[:, None, None] - 1, axis=1)
    return jnp.concatenate([last, after[:, : count - 1]], axis=1)


@jax.jit
def compare(model: Any, dense: jax.Array, compressed: jax.Array, continuation: jax.Array) -> Scores:
    """Score the tokens [B, n] of a continuation, given hidden states [B, n, D] through two caches."""

    def score(token: tuple[jax.Array, jax.Array, jax.Array]) -> Scores:
        dense, compressed, target = token
        expected, predicted = (jax.nn.log_softmax(model.logits(hidden)) for hidden in (dense, compressed))
        kl = jnp.sum(jnp.exp(expected) * (expected - predicted))
        return Scores(-predicted[target], -expected[target], kl, jnp.argmax(predicted) == target)

    tokens = (dense.reshape(-1, dense.shape[-1]), compressed.reshape(-1, dense.shape[-1]), continuation.reshape(-1))
    scores = lax.map(score, tokens, batch_size=TOKENS)
    return Scores(*(leaf.reshape(continuation.shape) for leaf in scores))


@jax.jit
def _embed(model: Any, tokens: jax.Array) -> jax.Array:
    return model.embed(tokens)


@functools.partial(jax.jit, donate_argnames=("hidden", "after"))
def _through_layer(
    layer: Any, cache: LayerCache, hidden: jax.Array, after: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts [B, S, D] and what follows them [B, n, D] through one layer; and bool [B], whether its cache overflowed.

    What a layer makes of a token depends on its own cache and the layer below alone, so all tokens may pass one layer
    before any passes the next: one layer is compiled, and one layer's cache is held.
    """
    hidden, cache = layer.prefill(hidden, cache, lengths)
    blocks = after.reshape(after.shape[0], -1, BLOCK, after.shape[2]).swapaxes(0, 1)

    def step(cache: LayerCache, block: jax.Array) -> tuple[LayerCache, jax.Array]:
        out, cache = layer.extend(block, cache)
        return cache, out

    cache, outs = lax.scan(step, cache, blocks)
    return hidden, outs.swapaxes(0, 1).reshape(after.shape), cache.overflow
