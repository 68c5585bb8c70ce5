"""How fast a model writes through a cache, and what the cache holds."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.loop import stream
from mustafar_jax.generation.protocols import Model


@dataclasses.dataclass(frozen=True)
class Speed:
    """What `measure` found.

    Attributes:
        first_token: seconds from the call to the first new token of every sequence, the prompts' prefill.
        tokens_per_second: of all sequences together, after the first.
        cache_nbytes: bytes that the caches of all layers hold.
    """

    first_token: float
    tokens_per_second: float
    cache_nbytes: int


def measure(
    model: Model,
    config: CompressionConfig,
    *,
    batch: int,
    context: int,
    new_tokens: int,
    implementation: Implementation = None,
) -> Speed:
    """Time a generation by the clock: random prompts, greedy tokens, after one generation that compiles.

    Args:
        model: as in `generate`.
        config: how the caches are compressed; `generation.DENSE` for the baseline.
        batch: prompts.
        context: tokens of each.
        new_tokens: how long they are continued, at least 2.
        implementation: as in `generate`.

    Raises:
        ValueError: new_tokens below 2; and as `generate` does.
    """
    if new_tokens < 2:
        raise ValueError(f"{new_tokens=} must be at least 2: the speed is that of the tokens after the first")
    how: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "config": config,
        "eos_id": (),
        "implementation": implementation,
        "padding": False,
    }
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context))
    for _ in range(2):  # the first one compiles
        start = time.perf_counter()
        steps = stream(model, tokens, **how)
        times = [time.perf_counter() - start for _ in steps]
    make = functools.partial(model.init_cache, config, batch=batch, capacity=context + new_tokens)
    held = sum(cache.nbytes for cache in jax.eval_shape(make))
    return Speed(times[0], batch * (new_tokens - 1) / (times[-1] - times[0]), held)
