"""Time a decode step's attention on compressed caches beside dense attention: python -m benchmarks.attention.

A row is one call of `mustafar_jax.decode_attention` on a whole cache: packed part, dense window, their merge, and for
"recommended" the centred keys' mean. It is checked against attention in float32 on the pruned tensors first, and shows
no time where it fails. Dense attention is cuDNN's through `jax.nn.dot_product_attention`, and the best of PyTorch's
backends where torch is installed. Writes benchmarks/results/<device>/attention.json, and attention.png where matplotlib
is installed.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import mustafar_jax as mj
from benchmarks.origin import where

RESULTS = pathlib.Path(__file__).parent / "results"
HEAD_DIM = 128
DTYPE = jnp.bfloat16
TOLERANCE = 5e-3
REPEATS, CALLS = 7, 20
INV_FREQ = 500000.0 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
CONFIGS: dict[str, Callable[[float, float], mj.CompressionConfig]] = {
    "published": mj.CompressionConfig,
    "recommended": mj.CompressionConfig.recommended,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One query token per sequence against a cache of `tokens`."""

    name: str
    batch: int
    kv_heads: int
    group: int
    tokens: int

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense keys and values."""
        return 2 * self.batch * self.kv_heads * self.tokens * HEAD_DIM * 2


SHAPES = [Shape("A", 8, 32, 1, 4096), Shape("B", 8, 8, 4, 16384)]
SWEEPS = {
    "context": [Shape(f"1 x {tokens}", 1, 8, 4, tokens) for tokens in (1024, 4096, 16384, 65536, 131072)],
    "batch": [Shape(f"{batch} x 8192", batch, 8, 4, 8192) for batch in (2, 8, 32)],
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--implementations", nargs="+", default=["triton"])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--no-sweeps", action="store_true", help="only the shapes A and B")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    shapes = SHAPES + ([] if options.no_sweeps else [shape for sweep in SWEEPS.values() for shape in sweep])
    bandwidth = copy_bandwidth()
    torch_times = time_torch(shapes)
    record = where() | {"copy_bytes_per_s": bandwidth}
    folder = options.output or RESULTS / str(record["device"]).replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for row in measure(shape, options, torch_times.get(shape.name)):
            rows.append(describe(shape) | row | {"limit_us": row["bytes"] / bandwidth * 1e6})
            print_row(rows)
            (folder / "attention.json").write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    plot(rows, folder / "attention.png")


def measure(
    shape: Shape, options: argparse.Namespace, torch_times: dict[str, float] | None
) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    dense = {"sparsity": 0.0, "bytes": shape.dense_nbytes}
    query, cache = make(shape, mj.CompressionConfig(0, 0))
    yield {"name": "dense, cuDNN", "us": time_attention(query, cache, "cudnn")} | dense
    if torch_times:
        best = min(torch_times, key=torch_times.__getitem__)
        yield {"name": f"dense, torch {best}", "us": torch_times[best]} | dense
    del cache
    for name in options.configs:
        for sparsity in options.sparsities:
            query, cache = make(shape, CONFIGS[name](sparsity, sparsity))
            wanted = reference(query, cache)
            for implementation in options.implementations:
                out = mj.decode_attention(query, cache, implementation=implementation).astype(jnp.float32)
                error = float(jnp.linalg.norm(out - wanted) / jnp.linalg.norm(wanted))
                us = time_attention(query, cache, implementation) if error < TOLERANCE else None
                row = {"name": f"{name} {sparsity}, {implementation}", "sparsity": sparsity, "us": us, "error": error}
                yield row | {"bytes": cache.nbytes}


def make(shape: Shape, config: mj.CompressionConfig) -> tuple[jax.Array, mj.LayerCache]:
    """A random query [B, N, H] and a full cache."""
    cache = mj.LayerCache.init(
        config,
        batch=shape.batch,
        capacity=shape.tokens,
        num_kv_heads=shape.kv_heads,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        inv_freq=INV_FREQ,
    )
    fill = jax.jit(functools.partial(_fill_rows, shape))
    for row in range(shape.batch):  # one sequence at a time: pruning through XLA takes many times its bytes
        cache = fill(cache, row)
    size = (shape.batch, shape.kv_heads * shape.group, HEAD_DIM)
    return jax.random.normal(jax.random.key(2), size, DTYPE), cache


def _fill_rows(shape: Shape, cache: mj.LayerCache, row: jax.Array) -> mj.LayerCache:
    size = (1, shape.tokens, shape.kv_heads, HEAD_DIM)
    key, value = (jax.random.normal(jax.random.fold_in(jax.random.key(i), row), size, DTYPE) for i in range(2))
    return mj.prefill(cache, key, value, rows=row[None])


@jax.jit
def reference(query: jax.Array, cache: mj.LayerCache) -> jax.Array:
    """Attention in float32 on what the cache holds, a KV head of a sequence at a time."""
    key, value, _ = cache.to_dense()
    grouped = query.reshape(cache.batch * cache.num_kv_heads, -1, HEAD_DIM)

    def one(arguments: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value = (x.astype(jnp.float32) for x in arguments)
        scores = jnp.dot(query, key.T, precision=lax.Precision.HIGHEST) * HEAD_DIM**-0.5
        return jnp.dot(jax.nn.softmax(scores), value, precision=lax.Precision.HIGHEST)

    heads = (x.swapaxes(1, 2).reshape(-1, cache.capacity, HEAD_DIM) for x in (key, value))
    return lax.map(one, (grouped, *heads)).reshape(query.shape)


def time_attention(query: jax.Array, cache: mj.LayerCache, implementation: str) -> float:
    """Microseconds of a call among calls of which each attends with the result of the one before."""

    @jax.jit
    def calls(query: jax.Array, cache: mj.LayerCache) -> jax.Array:
        for _ in range(CALLS):
            query = mj.decode_attention(query, cache, implementation=implementation)
        return query

    return time_call(calls, query, cache) / CALLS


def time_call(function: Callable[..., Any], *arguments: Any) -> float:
    """Microseconds, the median of repeats."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of plain copies of 1 GiB that queue one behind the other."""
    x = jnp.ones(2**28, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes * CALLS / time_call(lambda x: [copy(x) for _ in range(CALLS)], x) * 1e6


def time_torch(shapes: list[Shape]) -> dict[str, dict[str, float]]:
    """Microseconds of PyTorch's backends by shape, measured in a process of their own; none where torch cannot run."""
    arguments = json.dumps([dataclasses.asdict(shape) for shape in shapes])
    command = [sys.executable, "-m", "benchmarks.torch_attention", arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"without PyTorch: {(result.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return {}
    times: dict[str, dict[str, float]] = json.loads(result.stdout.splitlines()[-1])
    return times


def describe(shape: Shape) -> dict[str, Any]:
    """A row's first fields."""
    fields = dataclasses.asdict(shape)
    return {"shape": fields.pop("name")} | fields


def print_row(rows: list[dict[str, Any]]) -> None:
    """The last row, beside cuDNN's of its shape."""
    row = rows[-1]
    dense = next(other for other in rows if other["shape"] == row["shape"])
    shown = "wrong: no time" if row["us"] is None else f"{row['us']:8.1f} us  {row['us'] / dense['us']:.2f} of dense"
    print(f"{row['shape']:12s} {row['name']:32s} {shown}  limit {row['limit_us']:6.1f} us", flush=True)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time against context length, batch and sparsity, with the byte limits."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    sweeps = {
        ("tokens", "batch 1, 8 KV heads, 32 query heads"): SWEEPS["context"],
        ("batch", "8192 tokens, 8 KV heads, 32 query heads"): SWEEPS["batch"],
    }
    measured = {row["shape"] for row in rows}
    drawn = {label: shapes for label, shapes in sweeps.items() if measured >= {shape.name for shape in shapes}}
    figure, axes = pyplot.subplots(1, 1 + len(drawn), figsize=(7 + 5 * len(drawn), 4.5), squeeze=False)
    _draw_bars(axes[0, 0], [row for row in rows if row["shape"] in ("A", "B") and row["us"]])
    for axis, ((x, sizes), shapes) in zip(axes[0, 1:], drawn.items(), strict=True):
        names = {shape.name for shape in shapes}
        _draw_lines(axis, [row for row in rows if row["shape"] in names], x)
        axis.set_xlabel(f"{x} ({sizes})")
    for axis in axes[0]:
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _draw_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    axis.barh([f"{row['shape']}: {row['name']}" for row in rows], [row["us"] for row in rows])
    limits = [row["limit_us"] for row in rows]
    axis.scatter(limits, range(len(rows)), color="black", marker="|", zorder=3, label="byte limit")
    axis.invert_yaxis()
    axis.set_xlabel("microseconds")


def _draw_lines(axis: Any, rows: list[dict[str, Any]], x: str) -> None:
    for name in dict.fromkeys(row["name"].partition(" torch")[0] for row in rows):
        line = [row for row in rows if row["name"].startswith(name) and row["us"]]
        [drawn] = axis.loglog([row[x] for row in line], [row["us"] for row in line], "o-", label=name)
        limits = [row["limit_us"] for row in line]
        axis.loglog([row[x] for row in line], limits, ":", color=drawn.get_color())
    axis.set_ylabel("microseconds (dotted: byte limit)")


if __name__ == "__main__":
    main()
