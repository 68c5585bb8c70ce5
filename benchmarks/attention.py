"""Time a decode step's attention on compressed caches beside dense attention: python -m benchmarks.attention.

A row is one call of `mustafar_jax.decode_attention` on a whole cache of random data: packed part, dense window, their
merge, and for "recommended" the centred keys' mean. The last of the calls that are timed is checked against attention
in float32 on what the cache holds, and a row whose check fails shows no time. Dense attention is cuDNN's, through
`jax.nn.dot_product_attention` as it is and through the library, which tells it each sequence's length, and the best of
PyTorch's backends where torch is installed.

Times are of the device, from the profiler, the median of 20 calls, each on what the call before found; `clock_us` is by
the clock. Where a cache is not much larger than the second-level cache of the GPU, that is swept out between the calls,
and no time by the clock is given. Writes benchmarks/results/<device>/attention.json after each row, in which a row that
is measured again replaces what was there, and plots where matplotlib is installed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import mustafar_jax as mj
from benchmarks import attention_plots, device_time, synthetic
from benchmarks.attention_cases import CODES, RULES, SETS, SWEPT, Case
from benchmarks.gpu import require_gpu
from benchmarks.origin import where
from benchmarks.synthetic import MASKS, Shape
from benchmarks.table import Row, Table, attempt, folder_of
from mustafar_jax.pallas_kernels import cuda

TOLERANCE = 5e-3
REPEATS, CALLS = 7, 20
COPY_BYTES = 2**30
SWEEP_BYTES = 2**27
"""Bytes that sweep out the second-level cache, of 50 MB on an H100 and 60 MB on an H200; caches of more do so alone."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = _parser().parse_args(arguments)
    if options.shapes != ["tiny"]:
        require_gpu("attention", "--shapes tiny --dense-implementation xla tries the program")
    origin = where()
    folder = folder_of(origin["device"], options.output)
    table = Table(folder / "attention.json", lambda row: (row["shape"], row["name"]))
    shapes = [shape for name in options.shapes for shape in SETS[name]]
    bandwidth = copy_bandwidth()
    try:
        dense = [*time_torch(shapes)] if options.torch else []
        for shape in shapes:
            for row in (*(row for row in dense if row["shape"] == shape.name), *measure(shape, options)):
                limit = {"limit_us": row["bytes"] / bandwidth * 1e6, "copy_bytes_per_s": bandwidth}
                table.add(shape.describe() | row | limit | {"where": origin})
                print_row(table.rows)
    finally:
        attention_plots.plot(table.rows, folder / "attention.png")
        attention_plots.plot_ratios(table.rows, folder / "attention_ratio.png")
        attention_plots.plot_roofline(table.rows, folder / "attention_roofline.png")


def cases_of(shape: Shape, options: argparse.Namespace) -> list[Case]:
    """The cases of a shape; all sparsities where it is A or B, else the largest; codes wherever they can be."""
    dense = [Case(shape, "dense", 0.0, options.dense_implementation, lengths) for lengths in (False, True)]
    several = options.sparsities if shape.name in ("A", "B", "tiny") else [max(options.sparsities)]
    rules = [(rule, sparsity) for sparsity in several for rule in options.rules]
    rules += [(rule, 0.0) for rule in options.codes]
    return dense + [
        Case(shape, rule, sparsity, implementation)
        for rule, sparsity in rules
        for implementation in options.implementations
    ]


def measure(shape: Shape, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one shape; everything is compiled first, side by side."""
    cases = cases_of(shape, options)
    programs = device_time.compile_all({key: job for case in cases for key, job in jobs(case).items()})
    for config in dict.fromkeys(case.config for case in cases):
        of_config = [case for case in cases if case.config == config]
        for mask in _masks(of_config[0], options.masks):
            yield from _measure_cache(of_config, mask, programs)


def _masks(case: Case, masks: Iterable[str]) -> list[str]:
    """Those other than random at A and B, for the published rule at 0.7, where they are compared."""
    skewed = case.shape.name in ("A", "B", "tiny") and (case.rule, case.sparsity) == ("published", 0.7)
    return [mask for mask in masks if mask == "random" or skewed]


def _measure_cache(cases: Sequence[Case], mask: str, programs: dict[Any, Any]) -> Iterator[Row]:
    """Rows of cases with the same cache, which is made here."""
    shape, config = cases[0].shape, cases[0].config
    sink = jnp.float32(8.0 if mask == "sinks" else 1.0)
    cache = None
    for case in cases:

        def row(case: Case = case) -> Row:
            nonlocal cache
            if cache is None:
                cache = device_time.run(programs["fill", config], synthetic.scales(mask, shape), sink)
            return check_and_time(programs[case], programs["reference", config], synthetic.query(shape), cache)

        fields = {"rule": case.rule, "sparsity": case.sparsity, "implementation": case.implementation, "mask": mask}
        name = case.name + f", {mask} mask" * (mask != "random")
        yield fields | {"name": name, "bytes": cache_nbytes(shape, config)} | attempt(row)


def jobs(case: Case) -> dict[Any, jax.stages.Lowered | Exception]:
    """What a case needs compiled: how its cache is filled, the reference, and the calls that are timed."""
    shape, config = case.shape, case.config
    cache = jax.eval_shape(functools.partial(synthetic.empty_cache, shape, config))
    query = jax.eval_shape(functools.partial(synthetic.query, shape))
    scales = jax.ShapeDtypeStruct((2, shape.kv_heads, shape.head_dim), jnp.float32)
    sink = jax.ShapeDtypeStruct((), jnp.float32)
    return {
        ("fill", config): device_time.lowered(synthetic.full_cache, shape, config, scales, sink),
        ("reference", config): device_time.lowered(reference, query, cache),
        case: device_time.lowered(calls_of(case.attend, cache.nbytes), query, cache),
    }


def cache_nbytes(shape: Shape, config: mj.CompressionConfig) -> int:
    """Bytes that such a cache holds."""
    return jax.eval_shape(functools.partial(synthetic.empty_cache, shape, config)).nbytes


def calls_of(attend: Callable[[jax.Array, Any], jax.Array], nbytes: int, calls: int = CALLS) -> Any:
    """A jitted (query, cache of so many bytes) -> the query of the last of some calls, and what it found.

    Each call's query depends on what the call before found, but only a little: queries that were other calls' results
    would shrink to means of values. What stands between two calls has the scope "between".
    """
    sweep = nbytes < SWEEP_BYTES

    def run(query: jax.Array, cache: Any) -> tuple[jax.Array, jax.Array]:
        def call(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            _, out, swept = carry
            with jax.named_scope("between"):
                swept = swept * 0.5 + out[0, 0, 0]
                asked = (query + 1e-2 * out + 1e-6 * swept[0]).astype(query.dtype)
            return asked, attend(asked, cache), swept

        numbers = jnp.zeros(SWEEP_BYTES // 4 if sweep else 1, jnp.float32)
        return lax.fori_loop(0, calls, call, (query, jnp.zeros_like(query), numbers))[:2]

    return jax.jit(run)


def check_and_time(program: Any, check: Any, query: jax.Array, cache: mj.LayerCache) -> Row:
    """Microseconds of a call, if the last one is right; `program`, `check`: `calls_of` and `reference`, compiled."""
    asked, out = device_time.run(program, query, cache)
    error = relative_error(asked, out, cache, check)
    if not error < TOLERANCE:
        return {"us": None, "error": error, "reason": f"wrong: error ratio {error:.1e}"}
    return {"error": error} | time_calls(program, query, cache)


def relative_error(asked: jax.Array, out: jax.Array, cache: mj.LayerCache, check: Any) -> float:
    """||out - expected|| / ||expected||; `check` is `reference`, compiled."""
    wanted = device_time.run(check, asked, cache)
    return float(jnp.linalg.norm(out.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))


def time_calls(program: jax.stages.Compiled, query: jax.Array, cache: Any, calls: int = CALLS) -> Row:
    """What one of the calls in `calls_of`'s program takes, on the device or, where there is no GPU, by the clock."""
    swept = cache.nbytes < SWEEP_BYTES
    clock = None if swept else time_call(program, query, cache) / calls
    _, seconds = device_time.profile(program, query, cache, scopes=["between"], total=device_time.steady)
    if seconds["rest"]:
        return {"us": seconds["rest"] / calls * 1e6, "timed": "profiler", "clock_us": clock}
    reason = {"reason": "the profiler saw no kernels"} if swept else {}
    return {"us": clock, "timed": "clock", "clock_us": clock} | reason


@jax.jit
def reference(query: jax.Array, cache: mj.LayerCache) -> jax.Array:
    """Attention in float32 on what the cache holds, a KV head of a sequence at a time."""
    key, value, _ = cache.to_dense()
    head_dim = query.shape[-1]
    grouped = query.reshape(cache.batch * cache.num_kv_heads, -1, head_dim)

    def one(arguments: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value = (x.astype(jnp.float32) for x in arguments)
        # sums, not matrix products, which would be tuned for a while when they are compiled
        scores = jnp.sum(query[:, None] * key, axis=-1) * head_dim**-0.5
        return jnp.sum(jax.nn.softmax(scores)[..., None] * value, axis=1)

    heads = (x.swapaxes(1, 2).reshape(-1, cache.capacity, head_dim) for x in (key, value))
    return lax.map(one, (grouped, *heads)).reshape(query.shape)


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
    x = jnp.ones(COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes * CALLS / time_call(lambda x: [copy(x) for _ in range(CALLS)], x) * 1e6


def time_torch(shapes: list[Shape], timeout: float = 180) -> Iterator[Row]:
    """Rows of PyTorch's best backend for each shape, from a process of its own; none where torch cannot run."""
    command = [sys.executable, "-m", "benchmarks.torch_attention"]
    command += [json.dumps([dataclasses.asdict(shape) for shape in shapes]), str(SWEEP_BYTES)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except subprocess.SubprocessError as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()
        print(f"without PyTorch: {(reason or ['no reason given'])[-1]}")
        return
    times: dict[str, dict[str, float]] = json.loads(result.stdout.splitlines()[-1])
    for shape in shapes:
        if backends := times.get(shape.name):
            best = min(backends, key=backends.__getitem__)
            row = {"rule": "dense", "sparsity": 0.0, "implementation": f"torch {best}", "mask": "random"}
            row |= {"name": "dense, torch", "bytes": shape.dense_nbytes, "us": backends[best], "timed": "events"}
            yield shape.describe() | row | {"backends": backends}


def print_row(rows: list[Row]) -> None:
    """The last row, beside dense attention of its shape."""
    row, dense = rows[-1], attention_plots.dense_times(rows, rows[-1]["shape"])
    if row["us"] is None:
        shown = row["reason"]
    else:
        shown = f"{row['us']:8.1f} us (limit {row['limit_us']:6.1f})"
        if dense:
            first = next(iter(dense))
            shown += f"  {row['us'] / dense[first]:.2f} of {first}, {row['us'] / min(dense.values()):.2f} of the best"
    print(f"{row['shape']:12s} {row['name']:40s} {shown}", flush=True)


def present() -> list[str]:
    """The implementations for packed caches that run here."""
    capability = cuda.compute_capability()
    if capability is None:
        return ["xla"]
    return ["triton", "mosaic_gpu"] if capability == 9.0 else ["triton"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = [name for name in SETS if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SETS, default=sets, help="sets of shapes (%(default)s)")
    parser.add_argument("--rules", nargs="*", choices=RULES, default=[*RULES], help="of pruning (%(default)s)")
    parser.add_argument("--codes", nargs="*", choices=CODES, default=[*CODES], help="configs of codes (%(default)s)")
    parser.add_argument(
        "--sparsities",
        nargs="+",
        type=float,
        default=[0.5, 0.7],
        help=f"of keys and values; the plot against sparsity wants {SWEPT} at A and B (%(default)s)",
    )
    parser.add_argument(
        "--masks", nargs="+", choices=MASKS, default=[*MASKS], help="which entries are held (%(default)s)"
    )
    parser.add_argument(
        "--implementations", nargs="+", default=present(), help="for packed caches; all that run here (%(default)s)"
    )
    parser.add_argument("--dense-implementation", default="cudnn", help="for dense caches (%(default)s)")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="without PyTorch's backends")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    return parser


if __name__ == "__main__":
    main()
