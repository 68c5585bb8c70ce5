"""Time caches that a user could write in a few lines of jax.numpy: python -m benchmarks.rivals.

Keys and values in 4 bits with a scale for each vector, and in 8-bit floating point, made 16-bit numbers again within
the call and attended through XLA or cuDNN. Rows are checked against attention in float32 on what the cache stands for.
They join those of `benchmarks.attention` in attention.json, whose shapes and way of timing they share.
"""

import argparse
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import attention_plots, device_time, synthetic
from benchmarks.attention import TOLERANCE, calls_of, copy_bandwidth, print_row, time_calls
from benchmarks.attention_cases import SETS
from benchmarks.gpu import require_gpu
from benchmarks.origin import where
from benchmarks.synthetic import DTYPE, Shape
from benchmarks.table import Row, Table, attempt, folder_of

FORMATS: dict[str, Any] = {"4 bits": jnp.int4, "8-bit floats": jnp.float8_e4m3fn}


class Rival(NamedTuple):
    """Keys and values [B, S, K, H] in few bits, each with scales [B, S, K, 1], or None."""

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None
    value_scale: jax.Array | None

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take, two numbers of 4 bits to a byte."""
        return sum(x.size * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in self if x is not None)

    def dense(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values in 16 bits."""
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        key, value = (x.astype(DTYPE) if scale is None else x.astype(DTYPE) * scale for x, scale in pairs)
        return key, value


def attend(query: jax.Array, cache: Rival, *, implementation: Any) -> jax.Array:
    """A token of each sequence, [B, N, H]."""
    key, value = cache.dense()
    return jax.nn.dot_product_attention(query[:, None], key, value, implementation=implementation)[:, 0]


def filled(shape: Shape, dtype: Any) -> Rival:
    """Random keys and values, coded."""
    size = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)

    def coded(seed: int) -> tuple[jax.Array, jax.Array | None]:
        x = jax.random.normal(jax.random.key(seed), size, DTYPE)
        if dtype != jnp.int4:
            return x.astype(dtype), None
        scale = (jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 7).astype(DTYPE)
        return jnp.round(x / scale).astype(jnp.int4), scale

    (key, key_scale), (value, value_scale) = coded(0), coded(1)
    return Rival(key, value, key_scale, value_scale)


@jax.jit
def reference(query: jax.Array, cache: Rival) -> jax.Array:
    """In float32 on what the cache stands for, a sequence at a time."""

    def one(arguments: Any) -> jax.Array:
        query, cache = jax.tree.map(lambda x: x[None], arguments)
        exact = (x.astype(jnp.float32) for x in (query[:, None], *cache.dense()))
        return jax.nn.dot_product_attention(*exact, implementation="xla")[0, 0]

    return jax.lax.map(one, (query, cache))


def measure(shape: Shape, implementations: Sequence[str]) -> Iterator[Row]:
    """A row for each format and implementation."""
    for name, dtype in FORMATS.items():
        cache = jax.jit(filled, static_argnums=(0, 1))(shape, dtype)
        for implementation in implementations:
            fields = {"rule": "rival", "sparsity": 0.0, "implementation": implementation, "mask": "random"}
            row = functools.partial(measure_one, shape, cache, implementation)
            yield fields | {"name": f"dense in {name}, {implementation}", "bytes": cache.nbytes} | attempt(row)


def measure_one(shape: Shape, cache: Rival, implementation: str) -> Row:
    """Microseconds of a call, if the last one is right."""
    query, run = synthetic.query(shape), functools.partial(attend, implementation=implementation)
    job = device_time.lowered(calls_of(run, cache.nbytes), query, cache)
    program = device_time.compile_all({"": job})[""]
    asked, out = device_time.run(program, query, cache)
    assert not isinstance(program, Exception)  # it has run
    wanted = reference(asked, cache)
    error = float(jnp.linalg.norm(out.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))
    if not error < TOLERANCE:
        return {"us": None, "error": error, "reason": f"wrong: error ratio {error:.1e}"}
    return {"error": error} | time_calls(program, query, cache)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SETS, default=["A", "B", "C"], help="(%(default)s)")
    parser.add_argument("--implementations", nargs="+", default=["xla", "cudnn"], help="of attention (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.shapes != ["tiny"]:
        require_gpu("rivals", "--shapes tiny --implementations xla tries the program")
    origin, bandwidth = where(), copy_bandwidth()
    folder = folder_of(origin["device"], options.output)
    table = Table(folder / "attention.json", lambda row: (row["shape"], row["name"]))
    for shape in (shape for name in options.shapes for shape in SETS[name]):
        for row in measure(shape, options.implementations):
            limit = {"limit_us": row["bytes"] / bandwidth * 1e6, "copy_bytes_per_s": bandwidth}
            table.add(shape.describe() | row | limit | {"where": origin})
            print_row(table.rows)
    attention_plots.plot_roofline(table.rows, folder / "attention_roofline.png")


if __name__ == "__main__":
    main()
