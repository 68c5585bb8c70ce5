"""Time pruning and packing: python -m benchmarks.compression.

Prompts, beside copying as many bytes (dense rows read, packed rows written); and decoding's appends, averaged over the
steps of a group, beside appends that fill none. Each row is checked against the XLA implementation first, and shows no
time where it fails. Writes benchmarks/results/<device>/compression.json.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import mustafar_jax as mj
from benchmarks.attention import (
    CALLS,
    CONFIGS,
    DTYPE,
    HEAD_DIM,
    INV_FREQ,
    REPEATS,
    RESULTS,
    SHAPES,
    TOLERANCE,
    Shape,
    copy_bandwidth,
    describe,
)
from benchmarks.origin import where
from mustafar_jax import bitmap
from mustafar_jax.pallas_kernels.prune_pack import Prune, prune_pack
from mustafar_jax.pallas_kernels.rows import Mean, Packed
from mustafar_jax.pruning import keep_count, magnitude_mask, rescale_to_norm
from mustafar_jax.rope import rotate

SPARSITY = 0.7
"""Of the caches that are appended to."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    bandwidth, rows = copy_bandwidth(), []
    for shape in SHAPES:
        for sparsity in options.sparsity:
            for name in CONFIGS:
                rows.append(measure_prompt(shape, sparsity, name, bandwidth))
                print_row(rows[-1])
        for name in CONFIGS:
            for implementation in ("triton", "xla"):
                rows.append(measure_appends(shape, name, implementation))
                print_row(rows[-1])
    record = where() | {"copy_bytes_per_s": bandwidth, "rows": rows}
    folder = options.output or RESULTS / str(record["device"]).replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compression.json").write_text(json.dumps(record, indent=1) + "\n")


def measure_prompt(shape: Shape, sparsity: float, name: str, bandwidth: float) -> dict[str, Any]:
    """Prune and pack all of a prompt's keys and values; a row of the table."""
    config = CONFIGS[name](sparsity, sparsity)
    size = (shape.batch, shape.tokens, shape.kv_heads, HEAD_DIM)
    prompt = [jax.random.normal(key, size, DTYPE) for key in jax.random.split(jax.random.key(0))]
    mean = jax.random.normal(jax.random.key(1), (shape.batch, shape.kv_heads, HEAD_DIM)) if config.center_keys else None
    zeros = jnp.zeros(shape.batch, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def pack(targets: list[Packed], prompt: list[jax.Array]) -> list[Packed]:
        taken_off = None if mean is None else Mean(mean, jnp.asarray(INV_FREQ), 0)
        prunes = [Prune(prompt[0], targets[0], taken_off), Prune(prompt[1], targets[1], rescale=config.rescale_values)]
        return prune_pack(prunes, zeros, zeros, zeros + shape.tokens, rows=shape.tokens, head_axis=2)

    nbytes = sum(x.nbytes for x in [*prompt, *jax.tree.leaves(empty_rows(shape, sparsity))])
    packed = pack(empty_rows(shape, sparsity), prompt)
    error = float(prompt_error(packed, prompt, mean, sparsity, config.rescale_values))
    del packed
    microseconds = time_chain(pack, empty_rows(shape, sparsity), prompt) if error < TOLERANCE else None
    row = {"what": "prompt", "rule": name, "implementation": "triton", "sparsity": sparsity, "error": error}
    return describe(shape) | row | {"bytes": nbytes, "us": microseconds, "copy_us": nbytes / bandwidth * 1e6}


def empty_rows(shape: Shape, sparsity: float) -> list[Packed]:
    """Packed keys and values that hold nothing."""
    leading, kept = (shape.batch, shape.kv_heads), keep_count(HEAD_DIM, sparsity)
    both = (bitmap.empty(leading, shape.tokens, HEAD_DIM, kept, jnp.dtype(DTYPE)) for _ in range(2))
    return [Packed(rows.bitmap, rows.values) for rows in both]


@functools.partial(jax.jit, static_argnames=("sparsity", "rescale"))
def prompt_error(
    packed: list[Packed], prompt: list[jax.Array], mean: jax.Array | None, sparsity: float, rescale: bool
) -> jax.Array:
    """||packed - expected|| / ||expected||, a head at a time."""

    def one(arguments: Any) -> jax.Array:
        packed, (key, value), mean = arguments
        ranked = key
        if mean is not None:
            turned = rotate(mean[None], jnp.arange(key.shape[0]), jnp.asarray(INV_FREQ))
            ranked = (key.astype(jnp.float32) - turned).astype(key.dtype)
        masks = [magnitude_mask(x, sparsity) for x in (ranked, value)]
        value = rescale_to_norm(value, masks[1]) if rescale else value
        sums = []
        for rows, x, mask in zip(packed, (key, value), masks, strict=True):
            dense = bitmap.unpack(mj.BitmapArray(rows.bitmap, rows.values, jnp.zeros((), bool), x.shape[0])).astype(
                jnp.float32
            )
            wanted = jnp.where(mask, x, 0).astype(jnp.float32)
            sums.append(jnp.stack([jnp.sum((dense - wanted) ** 2), jnp.sum(wanted**2)]))
        return jnp.stack(sums)

    by_head = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (packed, [x.swapaxes(1, 2) for x in prompt], mean))
    sums = lax.map(one, by_head).sum(axis=0)
    return jnp.sqrt(sums[:, 0] / sums[:, 1]).max()


def measure_appends(shape: Shape, name: str, implementation: str) -> dict[str, Any]:
    """Append the tokens of a group to a cache that then packs one, in one compiled loop; a row of the table."""
    config = CONFIGS[name](SPARSITY, SPARSITY)
    length = config.sink_tokens + config.residual_length + shape.tokens - config.group
    size = (config.group, shape.batch, shape.kv_heads, HEAD_DIM)
    tokens = [jax.random.normal(key, size, DTYPE) for key in jax.random.split(jax.random.key(2))]

    @functools.partial(jax.jit, static_argnames=("steps", "by"), donate_argnums=0)
    def grow(cache: mj.LayerCache, tokens: list[jax.Array], *, steps: int, by: str = implementation) -> mj.LayerCache:
        def step(cache: mj.LayerCache, token: list[jax.Array]) -> tuple[mj.LayerCache, None]:
            return mj.append(cache, *token, implementation=by), None

        return lax.scan(step, cache, [x[:steps] for x in tokens])[0]

    def filled() -> mj.LayerCache:
        cache = mj.LayerCache.init(
            config,
            batch=shape.batch,
            capacity=length + 2 * config.group,
            num_kv_heads=shape.kv_heads,
            head_dim=HEAD_DIM,
            dtype=DTYPE,
            inv_freq=INV_FREQ,
        )
        # older tokens may be anything; the group that is packed next is appended here
        lengths = jnp.full(shape.batch, length - config.group, jnp.int32)
        return grow(dataclasses.replace(cache, lengths=lengths), tokens, steps=config.group, by="xla")

    result, wanted = (grow(filled(), tokens, steps=config.group, by=by) for by in (implementation, "xla"))
    error = cache_error(result, wanted)
    row: dict[str, Any] = {"what": "appends", "rule": name, "implementation": implementation, "sparsity": SPARSITY}
    times = {"us": config.group, "none_full_us": config.group - 1}
    for field, steps in times.items():
        run = functools.partial(grow, steps=steps)
        microseconds = time_fresh(run, filled, tokens) / steps if error < TOLERANCE else None
        row |= {field: microseconds}
    return describe(shape) | row | {"error": error}


def cache_error(actual: mj.LayerCache, expected: mj.LayerCache) -> float:
    """The largest ||actual - expected|| / ||expected|| of what attention sees."""
    errors = []
    for one, other in zip(actual.to_dense()[:2], expected.to_dense()[:2], strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        errors.append(float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)))
    return max(errors)


def time_chain(function: Callable[..., Any], state: Any, *arguments: Any) -> float:
    """Microseconds per call of state = function(state, ...), whose state is donated; the median over repeats."""
    state = jax.block_until_ready(function(state, *arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            state = function(state, *arguments)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def time_fresh(function: Callable[..., Any], make: Callable[[], Any], *arguments: Any) -> float:
    """Microseconds per call of function(state, ...), each on a state of its own, which is donated; the median."""
    jax.block_until_ready(function(make(), *arguments))
    times = []
    for _ in range(REPEATS):
        state = jax.block_until_ready(make())
        start = time.perf_counter()
        jax.block_until_ready(function(state, *arguments))
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    name = f"{row['shape']:3s} {row['what']:8s} {row['rule']:12s} {row['implementation']:7s} {row['sparsity']}"
    if row["us"] is None:
        shown = "wrong: no time"
    elif row["what"] == "prompt":
        shown = f"{row['us']:8.1f} us  {row['copy_us'] / row['us']:.2f} of a copy's speed"
    else:
        shown = f"{row['us']:8.1f} us a step, {row['none_full_us']:.1f} where none is full"
    print(f"{name}  {shown}", flush=True)


if __name__ == "__main__":
    main()
