"""Time decode attention over packed caches beside dense attention: python -m benchmarks.attention.

Each row is checked against attention in float32 on the pruned tensors first, and shows no time where it fails. Writes
benchmarks/results/<device>/attention.json, and attention.png where matplotlib is installed.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax import bitmap
from mustafar_jax.bitmap import BitmapArray
from mustafar_jax.pallas_kernels.decode_attention import decode_attention
from mustafar_jax.pallas_kernels.rows import Packed
from mustafar_jax.pruning import keep_count, magnitude_mask

RESULTS = pathlib.Path(__file__).parent / "results"
HEAD_DIM = 128
DTYPE = jnp.bfloat16
TOLERANCE = 5e-3
REPEATS, CALLS = 7, 20


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
SWEEP = [Shape(f"batch 1, {tokens} tokens", 1, 8, 4, tokens) for tokens in (1024, 4096, 16384, 65536, 131072)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--no-sweep", action="store_true", help="only the shapes A and B")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    shapes = SHAPES if options.no_sweep else [*SHAPES, *SWEEP]
    cases = [(shape, sparsity) for shape in shapes for sparsity in options.sparsity]
    bandwidth = copy_bandwidth()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # a kernel takes half a minute to compile
        compiled = dict(zip(cases, pool.map(lambda case: compile_packed(*case), cases), strict=True))
    rows = []
    for shape in shapes:
        rows.append(measure_dense(shape, bandwidth))
        print_row(rows[-1], rows[-1])
        dense = rows[-1]
        for sparsity in options.sparsity:
            rows.append(measure_packed(shape, sparsity, compiled[shape, sparsity], bandwidth))
            print_row(rows[-1], dense)
    device = jax.devices()[0].device_kind
    folder = options.output or RESULTS / device.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    record = {"device": device, "jax": jax.__version__, "commit": commit(), "copy_bytes_per_s": bandwidth, "rows": rows}
    (folder / "attention.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, folder / "attention.png")


def compile_packed(shape: Shape, sparsity: float) -> Callable[..., jax.Array]:
    """The kernel with its merge and normalisation, compiled for a shape."""

    def attend(query: jax.Array, key: Packed, value: Packed, first: jax.Array, last: jax.Array) -> jax.Array:
        out, _, total = decode_attention(query, key, value, first, last, scale=HEAD_DIM**-0.5)
        return (out / total[..., None]).astype(DTYPE)

    arguments = jax.eval_shape(functools.partial(make_packed, shape, sparsity))
    return jax.jit(attend).lower(*arguments).compile()


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_packed(shape: Shape, sparsity: float) -> tuple[jax.Array, Packed, Packed, jax.Array, jax.Array]:
    """Random arguments: query, key, value, first, last."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(key, (shape.tokens, HEAD_DIM), DTYPE)
        packed = bitmap.pack(x, magnitude_mask(x, sparsity), slots=keep_count(HEAD_DIM, sparsity))
        return packed.bitmap, packed.values

    heads = (shape.batch, shape.kv_heads)
    query_key, *keys = jax.random.split(jax.random.key(0), 3)
    key, value = (
        Packed(*(x.reshape(*heads, *x.shape[1:]) for x in lax.map(one, jax.random.split(k, heads[0] * heads[1]))))
        for k in keys
    )
    query = jax.random.normal(query_key, (*heads, shape.group, HEAD_DIM), DTYPE)
    return query, key, value, jnp.zeros(shape.batch, jnp.int32), jnp.full(shape.batch, shape.tokens, jnp.int32)


@jax.jit
def reference(query: jax.Array, key: Packed, value: Packed) -> jax.Array:
    """Attention in float32 on the unpacked tensors, a KV head at a time."""

    def one(arguments: tuple[jax.Array, Packed, Packed]) -> jax.Array:
        query, *rows = arguments
        key, value = (
            bitmap.unpack(BitmapArray(*x, jnp.zeros((), bool), x.bitmap.shape[0])).astype(jnp.float32) for x in rows
        )
        scores = jnp.dot(query.astype(jnp.float32), key.T, precision=lax.Precision.HIGHEST) * HEAD_DIM**-0.5
        return jnp.dot(jax.nn.softmax(scores), value, precision=lax.Precision.HIGHEST)

    per_head = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (query, key, value))
    return lax.map(one, per_head).reshape(query.shape)


def measure_packed(shape: Shape, sparsity: float, attend: Callable[..., jax.Array], bandwidth: float) -> dict[str, Any]:
    """A row of the table for our kernel."""
    arguments = make_packed(shape, sparsity)
    wanted = reference(*arguments[:3])
    error = float(jnp.linalg.norm(attend(*arguments).astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))
    nbytes = sum(x.nbytes for x in jax.tree.leaves(arguments[1:3]))
    row = {"name": f"packed {sparsity}", "sparsity": sparsity, "error": error, "bytes": nbytes}
    microseconds = time_calls(attend, *arguments) if error < TOLERANCE else None
    return describe(shape) | row | {"us": microseconds, "limit_us": nbytes / bandwidth * 1e6}


def measure_dense(shape: Shape, bandwidth: float) -> dict[str, Any]:
    """A row of the table for cuDNN on a dense cache."""
    size = (shape.batch, shape.tokens, shape.kv_heads, HEAD_DIM)
    key, value = (jax.random.normal(jax.random.key(i), size, DTYPE) for i in range(2))
    query = jax.random.normal(jax.random.key(2), (shape.batch, 1, shape.kv_heads * shape.group, HEAD_DIM), DTYPE)
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
    row = {
        "name": "dense, cuDNN",
        "sparsity": 0.0,
        "bytes": shape.dense_nbytes,
        "us": time_calls(attend, query, key, value),
    }
    return describe(shape) | row | {"limit_us": shape.dense_nbytes / bandwidth * 1e6}


def describe(shape: Shape) -> dict[str, Any]:
    """A row's first fields."""
    fields = dataclasses.asdict(shape)
    return {"shape": fields.pop("name")} | fields


def time_calls(function: Callable[..., Any], *arguments: Any) -> float:
    """Microseconds per call: the median over repeats of calls that queue one behind the other."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(CALLS)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a plain copy of 1 GiB."""
    x = jnp.ones(2**28, jnp.float32)
    return 2 * x.nbytes / time_calls(jax.jit(lambda x: x + 1), x) * 1e6


def commit() -> str:
    """The checkout's commit; empty outside of one."""
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def print_row(row: dict[str, Any], dense: dict[str, Any]) -> None:
    """One line of the table."""
    shown = "wrong: no time" if row["us"] is None else f"{row['us']:8.1f} us  {row['us'] / dense['us']:.2f} of dense"
    print(f"{row['shape']:24s} {row['name']:14s} {shown}  limit {row['limit_us']:6.1f} us", flush=True)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time against context length at batch 1, with the byte limits."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    sweep = [row for row in rows if row["batch"] == 1]
    for name in dict.fromkeys(row["name"] for row in sweep):
        line = [row for row in sweep if row["name"] == name and row["us"]]
        [drawn] = axes.loglog([row["tokens"] for row in line], [row["us"] for row in line], "o-", label=name)
        limits = [row["limit_us"] for row in line]
        axes.loglog([row["tokens"] for row in line], limits, ":", color=drawn.get_color(), label=f"{name}, byte limit")
    axes.set_xlabel("tokens (batch 1, 8 KV heads, 32 query heads)")
    axes.set_ylabel("microseconds")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
