"""Which token comes next: the likeliest, or one that is drawn; and which tokens end a sequence."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.generation.checks import check_integer, check_number, numbers


class Sampling(NamedTuple):
    """How a token is drawn: a key, and temperature and top_p as scalars, so that new values compile nothing anew."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array


class Stops(NamedTuple):
    """What ends a sequence: tokens, int32 [n], and int32, how many tokens come before one of them can."""

    tokens: jax.Array
    earliest: jax.Array


def choose(logits: jax.Array, sampling: Sampling | None, stops: Stops, step: jax.Array) -> jax.Array:
    """float32 [B, V] -> int32 [B]: the likeliest token, or one drawn with a key of this step and each row."""
    too_early = (step < stops.earliest) & is_stop(jnp.arange(logits.shape[-1]), stops)
    logits = jnp.where(too_early, -jnp.inf, logits)
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The likeliest token's logit is 0, so that no temperature, however low, makes infinity of it.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    logits = nucleus(logits, sampling.top_p)
    key = jax.random.fold_in(sampling.key, step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf at all but the fewest likeliest tokens whose probabilities sum to at least top_p."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    kept = (before < top_p).at[:, 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def is_stop(token: jax.Array, stops: Stops) -> jax.Array:
    """int32 [n] -> bool [n]: whether each token ends a sequence."""
    return (token[:, None] == stops.tokens[None]).any(axis=-1)


def check_sampling(temperature: Any, top_p: Any, key: Any) -> Sampling | None:
    """How to draw; None where the likeliest token is taken. The arguments and errors are those of `generate`."""
    temperature, top_p = check_number("temperature", temperature), check_number("top_p", top_p)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{temperature=} must be finite and at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"{top_p=} must lie in (0, 1]")
    if key is not None:
        _check_key(key)
    if temperature == 0:
        if top_p < 1:
            raise ValueError(f"{top_p=} needs a temperature above 0: {temperature=} takes the likeliest token")
        return None
    if key is None:
        raise ValueError(f"key=None: {temperature=} draws tokens at random, which needs a jax.random.key")
    # XLA takes subnormal numbers for 0, and may multiply by the inverse instead of dividing.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    temperature = min(max(temperature, smallest), 1 / smallest)
    return Sampling(key, jax.device_put(np.float32(temperature)), jax.device_put(np.float32(top_p)))


def _check_key(key: Any) -> None:
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
    return Stops(jax.device_put(given.astype(np.int32)), jax.device_put(np.int32(min_new_tokens)))
