"""Find the best launch parameters of decode attention on this GPU: python -m benchmarks.tune --kernel triton.

Times whole calls, with the merge of the splits, for a grid of sizes and splits, and after each size writes what was
fastest to pallas_kernels/tuned.json, by device and kernel, in place of what was there for that size. Caches hold
exactly 40 of 128 entries of each row, and do not stay in the GPU's second-level cache from call to call. Blocks of
the Mosaic GPU kernel have 4 warps; sizes for which they have more do not ask this file (`mosaic.launch.mosaic_params`).
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import mustafar_jax as mj
from benchmarks import device_time, synthetic
from benchmarks.attention import calls_of, check_and_time, present, reference
from benchmarks.gpu import require_gpu
from benchmarks.synthetic import Shape
from benchmarks.table import attempt
from mustafar_jax.attention import decode_operands
from mustafar_jax.backend import Attended
from mustafar_jax.cache import PackedCache
from mustafar_jax.operands import PackedAttention
from mustafar_jax.pallas_kernels import launch
from mustafar_jax.pallas_kernels.mosaic import decode_attention as mosaic
from mustafar_jax.pallas_kernels.mosaic import launch as mosaic_launch
from mustafar_jax.pallas_kernels.triton import decode_attention as triton
from mustafar_jax.pallas_kernels.triton import launch as triton_launch

TUNED = pathlib.Path(__file__).parents[1] / "pallas_kernels" / "tuned.json"
SIZES = ["8x32", "8x128", "8x512", "8x1024", "32x128", "64x32", "64x128", "64x256", "256x32", "256x128"]
SPLITS = (1, 2, 3, 4, 6, 8, 11, 16, 24, 32, 64, 66, 128)
CONFIG = mj.CompressionConfig(0.7, 0.7)
Kernel = tuple[Callable[..., Attended], Callable[[int], Any], Callable[[], int]]
KERNELS: dict[str, Kernel] = {
    "triton": (triton.decode_attention, triton_launch.DecodeParams, triton_launch.wave),
    "mosaic_gpu": (mosaic.decode_attention, mosaic_launch.MosaicParams, mosaic_launch.wave),
}
"""By name: the kernel, its launch parameters for a number of splits, and the blocks that a device holds at once."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = _parser().parse_args(arguments)
    require_gpu("tune")
    kind = jax.devices()[0].device_kind
    for kernel in options.kernels:
        for heads, tiles in options.sizes:
            times = time_splits(kernel, heads, tiles, options.group, options.head_dim)
            shown = ", ".join(f"{splits}: {us:.1f}" for splits, us in times.items())
            print(
                f"{kernel}, {heads} heads of {tiles} tiles, us by splits: {shown or 'none could be timed'}", flush=True
            )
            if times:
                best = min(times, key=times.__getitem__)
                entry = {"heads": heads, "tiles": tiles, "splits": best, "us": round(times[best], 1)}
                write(options.output, kind, kernel, entry)


def write(path: pathlib.Path, kind: str, kernel: str, entry: dict[str, Any]) -> None:
    """Put an entry beside those of other devices, kernels and sizes; each on a line of its own."""
    tuned = json.loads(path.read_text()) if path.exists() else {}
    entries = tuned.setdefault(kind, {}).setdefault(kernel, [])
    size = ("heads", "tiles")
    entries[:] = [e for e in entries if any(e[field] != entry[field] for field in size)] + [entry]
    entries.sort(key=lambda e: [e[field] for field in size])
    devices = []
    for name, kernels in tuned.items():
        lists = (
            f'  "{kernel}": [\n   ' + ",\n   ".join(map(json.dumps, found)) + "\n  ]"
            for kernel, found in kernels.items()
        )
        devices.append(f' "{name}": {{\n' + ",\n".join(lists) + "\n }")
    path.write_text("{\n" + ",\n".join(devices) + "\n}\n")


def time_splits(kernel: str, heads: int, tiles: int, group: int, head_dim: int) -> dict[int, float]:
    """Microseconds of a call, by splits, of those that might be best; without those that fail or are wrong."""
    tokens = tiles * launch.TILE + CONFIG.residual_length
    shape = Shape("tuned", 1, heads, group, tokens, head_dim)
    query, cache = jax.eval_shape(lambda: (synthetic.query(shape), synthetic.empty_cache(shape, CONFIG)))

    def job(splits: int) -> Any:
        return device_time.lowered(calls_of(attention(kernel, splits), cache.nbytes), query, cache)

    jobs = {n: job(n) for n in SPLITS if plausible(kernel, heads, tiles, n)}
    programs = device_time.compile_all({0: device_time.lowered(reference, query, cache)} | jobs)
    query, cache = synthetic.query(shape), synthetic.full_cache(shape, CONFIG, synthetic.scales("random", shape))
    times: dict[int, float] = {}
    for n in jobs:
        row = attempt(functools.partial(check_and_time, programs[n], programs[0], query, cache))
        if row["us"] is None:
            print(f"{n} splits: {row['reason']}")
        else:
            times[n] = row["us"]
    return times


def plausible(kernel: str, heads: int, tiles: int, splits: int) -> bool:
    """Whether so many splits might be best: they fill a quarter of the device, or cannot, and are not far too many."""
    wave = KERNELS[kernel][2]()
    return splits <= tiles and (heads * splits >= wave / 4 or splits == tiles) and heads * splits <= 4 * wave


def attention(kernel: str, splits: int) -> Any:
    """The kernel as a function of a query [1, N, H] and a packed cache, launched with so many splits."""
    decode_attention, params, _ = KERNELS[kernel]

    def attend(query: jax.Array, cache: PackedCache) -> jax.Array:
        grouped = query.reshape(cache.batch, cache.num_kv_heads, -1, cache.head_dim)
        operands = decode_operands(grouped, cache, cache.head_dim**-0.5, None)
        assert isinstance(operands, PackedAttention)
        out = decode_attention(operands, params=params(splits))
        assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
        return jnp.reshape(out, query.shape)

    return attend


def _size(text: str) -> tuple[int, int]:
    heads, _, tiles = text.partition("x")
    return int(heads), int(tiles)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kernels = [name for name in present() if name in KERNELS]
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=kernels, help="all that run here (%(default)s)"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[_size(text) for text in SIZES],
        metavar="HEADSxTILES",
        help=f"sequences times KV heads, and tiles of {launch.TILE} tokens ({' '.join(SIZES)})",
    )
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=TUNED, help="the file (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
