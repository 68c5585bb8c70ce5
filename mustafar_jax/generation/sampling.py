"""Which token comes next: the likeliest, or one that is drawn; and which tokens end a sequence."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.generation.checks import check_integer, check_number, numbers


class Sampling(NamedTuple):
    """How a token is drawn: a key, and the other arguments as scalars, so that new values compile nothing anew."""

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


class Stops(NamedTuple):
    """What ends a sequence: tokens, int32 [n]; int32, how many tokens come before one of them can, and at most."""

    tokens: jax.Array
    earliest: jax.Array
    latest: jax.Array


def choose(logits: jax.Array, sampling: Sampling | None, stops: Stops, step: jax.Array) -> jax.Array:
    """float32 [B, V] -> int32 [B]: the likeliest token, or one drawn with a key of this step and each row."""
    too_early = (step < stops.earliest) & is_stop(jnp.arange(logits.shape[-1]), stops)
    logits = jnp.where(too_early, -jnp.inf, logits)
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The likeliest token's logit is 0, so that no temperature, however low, makes infinity of it.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    logits = likeliest(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    key = jax.random.fold_in(sampling.key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def likeliest(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Logits with -inf at all but the tokens to draw from; the likeliest always stays.

    Args:
        logits: float32 [B, V].
        top_k: int32, how many of the likeliest stay; of equal ones the first.
        top_p: of these, the fewest likeliest whose probabilities sum to at least this (nucleus sampling, Holtzman et
            al. 2020, section 3.1).
        min_p: of these, those at least this times as probable as the likeliest (Nguyen et al. 2024, section 3).
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])[None]
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    probability = jax.nn.softmax(jnp.where(rank < top_k, ranked, -jnp.inf))
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (rank < top_k) & (before < top_p) & (probability >= min_p * probability[:, :1])
    kept = jnp.take_along_axis(kept.at[:, 0].set(True), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def is_stop(token: jax.Array, stops: Stops) -> jax.Array:
    """int32 [n] -> bool [n]: whether each token ends a sequence."""
    return (token[:, None] == stops.tokens[None]).any(axis=-1)


def check_sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any, key: Any) -> Sampling | None:
    """How to draw; None where the likeliest token is taken. The arguments and errors are those of `generate`."""
    temperature, top_p = check_number("temperature", temperature), check_number("top_p", top_p)
    min_p, top_k = check_number("min_p", min_p), None if top_k is None else check_integer("top_k", top_k)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{temperature=} must be finite and at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{min_p=} must lie in 0 .. 1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{top_k=} must be at least 1, or None for all tokens")
    if key is not None:
        check_key(key)
    if temperature == 0:
        without = {"top_k": top_k is not None and f"{top_k=}", "top_p": top_p < 1 and f"{top_p=}"}
        without["min_p"] = min_p > 0 and f"{min_p=}"
        if given := [text for text in without.values() if text]:
            raise ValueError(f"{given[0]} needs a temperature above 0: {temperature=} takes the likeliest token")
        return None
    if key is None:
        raise ValueError(f"key=None: {temperature=} draws tokens at random, which needs a jax.random.key")
    # XLA takes subnormal numbers for 0, and may multiply by the inverse instead of dividing.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    temperature = min(max(temperature, smallest), 1 / smallest)
    most = np.iinfo(np.int32).max
    scalars = np.float32(temperature), np.int32(min(most, top_k or most)), np.float32(top_p), np.float32(min_p)
    return Sampling(key, *map(jax.device_put, scalars))


def check_key(key: Any) -> None:
    """Raise TypeError for what is no jax.random.key, ValueError for several."""
    if not isinstance(key, jax.Array):
        raise TypeError(f"{key=} is of type {type(key).__name__}; wanted one jax.random.key")
    given = f"key is {key.dtype}{list(key.shape)}; wanted one jax.random.key"
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(given)
    if key.shape != ():
        raise ValueError(given)


def check_stops(model: Any, eos_id: int | Sequence[int] | None, min_new_tokens: int, max_new_tokens: int) -> Stops:
    """What ends a sequence. The arguments and errors are those of `generate`."""
    min_new_tokens = check_integer("min_new_tokens", min_new_tokens)
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"{min_new_tokens=} must be an integer in 0 .. {max_new_tokens=}")
    if eos_id is None:
        eos_id = getattr(model.config, "eos_ids", None) or ()
    wanted = "an integer, a sequence of integers, or None for the model's own"
    given = np.atleast_1d(numbers("eos_id", eos_id, wanted))
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"{eos_id=} must be {wanted}")
    if given.ndim != 1:
        raise ValueError(f"{eos_id=} must be {wanted}")
    if given.size and not 0 <= given.min() <= given.max() < 2**31:
        raise ValueError(f"{eos_id=} must hold tokens, 0 .. 2**31 - 1")
    counts = [np.int32(min(count, np.iinfo(np.int32).max)) for count in (min_new_tokens, max_new_tokens)]
    return Stops(jax.device_put(given.astype(np.int32)), *map(jax.device_put, counts))
