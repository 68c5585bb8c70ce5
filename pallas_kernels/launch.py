"""Launch parameters of the kernels: explicit, else tuned for this device, else a heuristic."""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable

from mustafar_jax.pallas_kernels import cuda

TILE = 128
"""Tokens that a block takes at a time."""

_CORES = 132
"""Multiprocessors of an H100 or H200, taken where there is no GPU to ask."""

_PER_CORE = {"triton": 4, "mosaic_gpu": 2}
"""Blocks that a multiprocessor of an H100 or H200 holds at once, or nearly: centred keys cost registers."""

_NEAR = math.log(1.5)
"""How far tuned sizes may lie from the ones asked for, in logarithms of heads and of tiles together."""


@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """How decode attention is launched.

    Attributes:
        splits: blocks that share the tokens of one KV head, each its own run of whole tiles; at least 1.
    """

    splits: int

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} must be at least 1")


def decode_params(*, heads: int, rows: int) -> DecodeParams:
    """Launch parameters from static facts alone: tuned.json's for this device and sizes near these, else computed.

    Args:
        heads: sequences times KV heads.
        rows: packed rows per sequence.
    """
    return DecodeParams(_splits("triton", heads, rows, _cost))


def wave(kernel: str) -> int:
    """Blocks of a kernel, "triton" or "mosaic_gpu", that the GPU holds at once."""
    return cores() * _PER_CORE[kernel]


def cores() -> int:
    """Multiprocessors of this GPU; those of an H100 where there is none."""
    return cuda.core_count() or _CORES


def _cost(heads: int, tiles: int, splits: int) -> float:
    """Tiles that a place for a block works through: its share, and at the end half a block in which others are idle.

    Starting a block costs about as much as a tile.
    """
    block = -(-tiles // splits) + 1
    return max(heads * splits / wave("triton"), 1) * block + block / 2


def _splits(kernel: str, heads: int, rows: int, cost: Callable[[int, int, int], float]) -> int:
    """Those of tuned.json for sizes near these, if there are any, else the ones that cost the least."""
    tiles = max(1, -(-rows // TILE))

    def distance(entry: dict[str, int]) -> float:
        return abs(math.log(entry["heads"] / heads)) + abs(math.log(entry["tiles"] / tiles))

    nearest = min(_tuned(cuda.device_kind(), kernel), key=distance, default=None)
    if nearest is not None and distance(nearest) <= _NEAR:
        return min(nearest["splits"], tiles)
    return _cheapest(heads, tiles, cost)


def _cheapest(heads: int, tiles: int, cost: Callable[[int, int, int], float]) -> int:
    return min(range(1, tiles + 1), key=lambda splits: cost(heads, tiles, splits))


@functools.cache
def _tuned(device_kind: str | None, kernel: str) -> list[dict[str, int]]:
    """What `python -m benchmarks.tune` found: {"heads", "tiles", "splits"} each."""
    text = importlib.resources.files(__package__).joinpath("tuned.json").read_text()
    found: list[dict[str, int]] = json.loads(text).get(device_kind, {}).get(kernel, [])
    return found


@dataclasses.dataclass(frozen=True)
class MosaicParams:
    """How decode attention through Mosaic GPU is launched.

    Attributes:
        splits: blocks that share the tokens of one KV head.
        warps: per block, a multiple of 4; each takes 32 tokens at a time.
    """

    splits: int
    warps: int = 4

    def __post_init__(self) -> None:
        if self.splits < 1 or self.warps < 4 or self.warps % 4:
            raise ValueError(f"{self} must have at least one split, and a multiple of 4 warps")


_MOSAIC_START = 3
"""What starting and ending such a block costs, in tiles; a guess."""
_WIDE = 12
"""Warps of a block that has a multiprocessor to itself, in place of two blocks of 4: 168 registers a thread."""


def mosaic_params(*, heads: int, rows: int, group: int, slots: int) -> MosaicParams:
    """Launch parameters from static facts alone.

    Those of wide blocks, where they are faster, are computed; those of blocks of 4 warps are tuned.json's, as in
    `decode_params`, else computed.

    Args:
        heads: sequences times KV heads.
        rows: packed rows per sequence.
        group: query heads per KV head.
        slots: of a row of keys and one of values together, a dense row counting as twice its entries.
    """
    tiles = max(1, -(-rows // TILE))
    if _is_wide(heads, tiles, group, slots):
        return MosaicParams(_cheapest(heads, tiles, functools.partial(_mosaic_cost, warps=_WIDE)), _WIDE)
    return MosaicParams(_splits("mosaic_gpu", heads, rows, _mosaic_cost))


def _is_wide(heads: int, tiles: int, group: int, slots: int) -> bool:
    """Whether wide blocks are faster: where registers suffice, and each warp has 12 units of 32 tokens or more.

    As measured on an H100, for packed keys and values (docs/kernels.md).
    """
    return group <= 8 and slots <= 96 and heads * tiles * 4 >= 12 * _WIDE * cores()


def _mosaic_cost(heads: int, tiles: int, splits: int, *, warps: int = 4) -> float:
    """Tiles that 4 warps of a block take one after the other, in whole waves of blocks."""
    at_once = cores() if warps == _WIDE else wave("mosaic_gpu")
    share = math.ceil(-(-tiles // splits) * 4 / warps)
    return -(-heads * splits // at_once) * (share + _MOSAIC_START)
