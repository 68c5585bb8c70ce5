"""Find the best launch parameters of decode attention on this GPU: python -m benchmarks.tune.

Times the kernel for a grid of sizes and writes what was fastest to pallas_kernels/tuned.json, beside other devices'
entries.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks.attention import DTYPE, HEAD_DIM, time_call
from mustafar_jax.pallas_kernels.decode_attention import attend_rows
from mustafar_jax.pallas_kernels.launch import TILE, WAVE, DecodeParams
from mustafar_jax.pallas_kernels.rows import WORD, Packed

TUNED = pathlib.Path(__file__).parents[1] / "pallas_kernels" / "tuned.json"
SIZES = [(8, 32), (8, 128), (8, 512), (8, 1024), (32, 128), (64, 32), (64, 128), (64, 256), (256, 32), (256, 128)]
SPLITS = (1, 2, 3, 4, 6, 8, 11, 16, 24, 32, 64, 66, 128)
SLOTS, GROUP, CALLS = 40, 4, 20


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=TUNED)
    options = parser.parse_args()
    cases = [(heads, tiles, splits) for heads, tiles in SIZES for splits in SPLITS if _plausible(heads, tiles, splits)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = dict(zip(cases, pool.map(compile_case, cases), strict=True))
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for case in track(cases, description="sizes and splits"):
        heads, tiles, splits = case
        us = time_call(compiled[case], *make(heads, tiles)) / CALLS
        entry = {"heads": heads, "tiles": tiles, "splits": splits, "us": round(us, 1)}
        best[heads, tiles] = min(entry, best.get((heads, tiles), entry), key=lambda e: e["us"])
    tuned = json.loads(options.output.read_text()) if options.output.exists() else {}
    tuned[jax.devices()[0].device_kind] = list(best.values())
    lines = {kind: "[\n  " + ",\n  ".join(map(json.dumps, entries)) + "\n ]" for kind, entries in tuned.items()}
    options.output.write_text("{\n" + ",\n".join(f' "{kind}": {text}' for kind, text in lines.items()) + "\n}\n")


def _plausible(heads: int, tiles: int, splits: int) -> bool:
    return splits <= tiles and (heads * splits >= WAVE / 4 or splits == tiles) and heads * splits <= 4 * WAVE


@functools.partial(jax.jit, static_argnums=(0, 1))
def make(heads: int, tiles: int) -> tuple[jax.Array, Packed, Packed, jax.Array]:
    """Query, keys, values and length of one sequence with so many KV heads; a quarter of the bits is set."""
    rows = tiles * TILE

    def packed(seed: int) -> Packed:
        key = jax.random.key(seed)
        first, second = jax.random.bits(key, (2, 1, heads, rows, HEAD_DIM // WORD), jnp.uint32)
        return Packed(first & second, jax.random.normal(key, (1, heads, rows // WORD, SLOTS // 8, WORD, 8), DTYPE))

    return jnp.ones((1, heads, GROUP, HEAD_DIM), DTYPE), packed(0), packed(1), jnp.full(1, rows, jnp.int32)


def compile_case(case: tuple[int, int, int]) -> Any:
    """Calls of the kernel, one after another."""
    heads, tiles, splits = case

    def calls(query: jax.Array, key: Packed, value: Packed, last: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            out, *_ = attend_rows(query, key, value, 0 * last, last, scale=0.1, params=DecodeParams(splits))
            query = (query + out[None, :, 0]).astype(query.dtype)  # each waits for the one before
        return query

    return jax.jit(calls).lower(*jax.eval_shape(functools.partial(make, heads, tiles))).compile()


if __name__ == "__main__":
    main()
