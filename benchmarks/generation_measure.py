"""One case in a process of its own: a random model is made, prefilled and decoded, and what that took is told."""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from rich.console import Console
from rich.progress import Progress

from benchmarks import device_time, synthetic
from benchmarks.generation_cases import DTYPE, SHAPES, Case
from mustafar_jax.generation import Caches, decode_step, prefill_prompt
from mustafar_jax.models import Llama, ModelConfig, memory

BLOCK = 32
"""Steps of one call: each sequence packs one group in it."""
BLOCKS = 2
"""Calls that are timed together; what remains of a case's steps is a call to warm up and one under the profiler."""
LONG, SHORT = 30.0, 10.0
"""Seconds of prefill above which it runs once: its time is then that of all layers but the first, which compiles; and
below which it runs three times more, otherwise once more."""
SCOPES = {"decode_attention": "attention", "append": "compression", "rest": "rest"}


def run_here(case: Case, run: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
    """What `run`, `measure` or `complete`, tells in this process; an error is an answer."""
    try:
        return {"status": "ok"} | run(case)
    except Exception as error:
        full = any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"))
        status = "out of memory" if full else "failed"
        return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def complete(case: Case) -> dict[str, Any]:
    """Prefill (or fill the caches) and decode, and measure nothing."""
    model, tokens = _model_and_tokens(case)
    token, caches = fill(tokens, case) if case.filled else _prefill(model, tokens, case, show=True)[:2]
    decode = lower_decode(model, token, caches, case.implementation).compile()
    for _ in range(case.new_tokens // BLOCK):
        token, caches = jax.block_until_ready(decode(model, token, caches))
    return {}


def measure(case: Case) -> dict[str, Any]:
    """Prefill (or fill the caches) and decode, and say what that took."""
    model, tokens = _model_and_tokens(case)
    token, caches, row = (*fill(tokens, case), {}) if case.filled else time_prefill(model, tokens, case)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    decode = lower_decode(model, token, caches, case.implementation)
    compiled = decode.compile()
    row |= {"weights_bytes": weights, "cache_bytes": held}
    if (in_use := memory_statistic("bytes_in_use")) is not None:
        row["decode_bytes"] = in_use + getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    token, caches, steps = time_decode(compiled, model, token, caches, case.new_tokens // (BLOCKS * BLOCK) - 1)
    row["peak_bytes"] = memory_statistic("peak_bytes_in_use")
    row |= {"tokens_per_s": case.batch / steps["step_ms"] * 1e3} | steps
    if case.split:
        token, caches, parts = split_decode(decode, model, token, caches)
        row |= parts
    held_tokens = case.capacity - BLOCK * (not case.split)
    if any((cache.overflow | (cache.lengths != held_tokens)).any() for cache in caches):
        raise RuntimeError(f"the caches do not hold the {held_tokens} tokens of prompt and continuation")
    return row


def _model_and_tokens(case: Case) -> tuple[Llama, jax.Array]:
    model = random_model(SHAPES[case.shape])
    return model, jax.random.randint(jax.random.key(1), (case.batch, case.context), 0, model.config.vocab_size)


def random_model(config: ModelConfig) -> Llama:
    """A model with random weights, made on the device one by one."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=DTYPE, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten_with_path(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [
        _random_weight(key, leaf.shape, is_scale="['scale']" in jax.tree_util.keystr(path))
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(structure, weights))


@functools.partial(jax.jit, static_argnames=("shape", "is_scale"))
def _random_weight(key: jax.Array, shape: tuple[int, ...], is_scale: bool) -> jax.Array:
    """A norm's scale, which is 1, or a matrix or a bias."""
    return jnp.ones(shape, DTYPE) if is_scale else 0.02 * jax.random.normal(key, shape, DTYPE)


def fill(tokens: jax.Array, case: Case) -> tuple[jax.Array, Caches]:
    """In place of a prefill: the prompts' last tokens, and caches that hold as many random rows as the prompts' tokens.

    Made layer by layer: beside the caches there is never more than one sequence of one layer.
    """
    config = SHAPES[case.shape]
    like = memory.abstract_caches(config, case.compression, case.capacity, batch=case.batch, dtype=DTYPE)
    lengths = jnp.full(case.batch, case.context, jnp.int32)
    one = jax.jit(functools.partial(synthetic.filled_like, like[0]))
    seeds = jax.random.split(synthetic.seed_of(2), len(like))
    return tokens[:, -1], tuple(jax.block_until_ready(one(lengths, seed)) for seed in seeds)


def time_prefill(model: Llama, tokens: jax.Array, case: Case) -> tuple[jax.Array, Caches, dict[str, Any]]:
    """The first new tokens, the filled caches, and the seconds to the first token."""
    token, caches, seconds = _prefill(model, tokens, case, show=True)
    if seconds >= LONG:
        return token, caches, {"ttft_s": seconds, "ttft_from": "the layers after the first, which compiles"}
    times: list[float] = []
    for _ in range(3 if seconds < SHORT else 1):
        del token, caches  # there may be no room for two
        token, caches, seconds = _prefill(model, tokens, case, show=False)
        times.append(seconds)
    return token, caches, {"ttft_s": statistics.median(times), "ttft_from": f"{len(times)} more, their median"}


def _prefill(model: Llama, tokens: jax.Array, case: Case, *, show: bool) -> tuple[jax.Array, Caches, float]:
    """Prefill; where it is shown, the seconds leave out the first layer's, which compile."""
    times: list[float] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not (show and sys.stderr.isatty())) as bar:
        task = bar.add_task("prefill", total=None)

        def progress(done: int, total: int) -> None:
            times.append(time.perf_counter())
            bar.update(task, completed=done, total=total)

        start = time.perf_counter()
        caches = model.init_cache(case.compression, batch=case.batch, capacity=case.capacity)
        lengths = jnp.full(case.batch, case.context, jnp.int32)
        how: dict[str, Any] = {"implementation": case.implementation, "progress": progress if show else None}
        logits, caches = prefill_prompt(model, tokens, lengths, caches, chunk=case.chunk, **how)
        token = jax.block_until_ready(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        jax.block_until_ready(caches)
        seconds = time.perf_counter() - start
    if len(times) > 1:
        seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    return token, caches, seconds


def lower_decode(model: Llama, token: jax.Array, caches: Caches, implementation: str | None) -> jax.stages.Lowered:
    """`BLOCK` greedy steps on the device, caches updated in place: (model, token, caches) -> (token, caches)."""

    def decode(model: Llama, token: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        def step(_: jax.Array, carry: tuple[jax.Array, Caches]) -> tuple[jax.Array, Caches]:
            logits, caches = decode_step(model, *carry, implementation=implementation)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), caches

        return lax.fori_loop(0, BLOCK, step, (token, caches))

    return jax.jit(decode, donate_argnums=(1, 2)).lower(model, token, caches)


def time_decode(
    decode: jax.stages.Compiled, model: Llama, token: jax.Array, caches: Caches, repeats: int
) -> tuple[jax.Array, Caches, dict[str, Any]]:
    """Go on from a token and caches; milliseconds of a step by the clock: of each repeat, and their median."""
    token, caches = jax.block_until_ready(decode(model, token, caches))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(BLOCKS):
            token, caches = decode(model, token, caches)
        jax.block_until_ready(token)
        times.append((time.perf_counter() - start) / (BLOCKS * BLOCK) * 1e3)
    return token, caches, {"step_ms": statistics.median(times), "steps_ms": times, "flatness": flatness(times)}


def flatness(times: Sequence[float]) -> float | None:
    """The largest deviation of times from a straight line, relative to it; None of fewer than 8 times.

    A cache that grows by the same number of tokens from time to time explains a straight line.
    """
    if len(times) < 8:
        return None
    place = np.arange(len(times))
    fitted = np.polynomial.Polynomial.fit(place, times, 1)(place)
    return float(np.max(np.abs(np.asarray(times) / fitted - 1)))


def split_decode(
    lowered: jax.stages.Lowered, model: Llama, token: jax.Array, caches: Caches
) -> tuple[jax.Array, Caches, dict[str, float]]:
    """Go on from a token and caches under the profiler; milliseconds of each part of a step."""
    decode = lowered.compile(compiler_options=device_time.NO_GRAPHS)
    (token, caches), seconds = device_time.profile(decode, model, token, caches, scopes=list(SCOPES)[:-1])
    if not any(seconds.values()):  # no GPU
        return token, caches, {}
    parts = {f"{part}_ms": seconds[scope] / BLOCK * 1e3 for scope, part in SCOPES.items()}
    return token, caches, parts | {"layer_attention_us": parts["attention_ms"] * 1e3 / len(caches)}


def memory_statistic(name: str) -> int | None:
    """One of the device's memory statistics; None where it keeps none."""
    return (jax.devices()[0].memory_stats() or {}).get(name)
