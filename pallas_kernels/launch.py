"""What both backends' launch parameters are made from: splits tuned for this device, else those that cost least."""

import functools
import importlib.resources
import json
import math
from collections.abc import Callable

from mustafar_jax.pallas_kernels import cuda

TILE = 128
"""Tokens that a split is counted in."""

_CORES = 132
"""Multiprocessors of an H100 or H200, taken where there is no GPU to ask."""

_NEAR = math.log(1.5)
"""How far tuned sizes may lie from the ones asked for, in logarithms of heads and of tiles together."""


def cores() -> int:
    """Multiprocessors of this GPU; those of an H100 where there is none."""
    return cuda.core_count() or _CORES


def tuned_or_cheapest(kernel: str, heads: int, rows: int, cost: Callable[[int, int, int], float]) -> int:
    """Splits: those of tuned.json for sizes near these, if there are any, else the ones that cost the least.

    Args:
        kernel: "triton" or "mosaic_gpu".
        heads: sequences times KV heads.
        rows: packed rows per sequence.
        cost: of (heads, tiles, splits).
    """
    tiles = max(1, -(-rows // TILE))

    def distance(entry: dict[str, int]) -> float:
        return abs(math.log(entry["heads"] / heads)) + abs(math.log(entry["tiles"] / tiles))

    nearest = min(_tuned(cuda.device_kind(), kernel), key=distance, default=None)
    if nearest is not None and distance(nearest) <= _NEAR:
        return min(nearest["splits"], tiles)
    return cheapest(heads, tiles, cost)


def cheapest(heads: int, tiles: int, cost: Callable[[int, int, int], float]) -> int:
    """Splits of so many tiles for which `cost(heads, tiles, splits)` is the least."""
    return min(range(1, tiles + 1), key=lambda splits: cost(heads, tiles, splits))


@functools.cache
def _tuned(device_kind: str | None, kernel: str) -> list[dict[str, int]]:
    """What `python -m benchmarks.tune` found: {"heads", "tiles", "splits"} each."""
    text = importlib.resources.files(__package__).joinpath("tuned.json").read_text()
    found: list[dict[str, int]] = json.loads(text).get(device_kind, {}).get(kernel, [])
    return found
