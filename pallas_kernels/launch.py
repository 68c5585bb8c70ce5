"""Launch parameters of the kernels: explicit, else tuned for this device, else a heuristic."""

import dataclasses
import functools
import importlib.resources
import json
import math

from mustafar_jax.pallas_kernels import triton

TILE = 128
"""Tokens that a block takes at a time."""

WAVE = 132 * 4
"""Blocks that an H100 or H200 holds at once, or nearly: centred keys cost registers."""

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
    tiles = max(1, -(-rows // TILE))

    def distance(entry: dict[str, int]) -> float:
        return abs(math.log(entry["heads"] / heads)) + abs(math.log(entry["tiles"] / tiles))

    nearest = min(_tuned(triton.device_kind()), key=distance, default=None)
    if nearest is not None and distance(nearest) <= _NEAR:
        return DecodeParams(min(nearest["splits"], tiles))
    return DecodeParams(min(range(1, tiles + 1), key=lambda splits: _cost(heads, tiles, splits)))


def _cost(heads: int, tiles: int, splits: int) -> float:
    """Tiles that a place for a block works through: its share, and at the end half a block in which others are idle.

    Starting a block costs about as much as a tile.
    """
    block = -(-tiles // splits) + 1
    return max(heads * splits / WAVE, 1) * block + block / 2


@functools.cache
def _tuned(device_kind: str | None) -> list[dict[str, int]]:
    """What `python -m benchmarks.tune` found: {"heads", "tiles", "splits"} each."""
    text = importlib.resources.files(__package__).joinpath("tuned.json").read_text()
    found: list[dict[str, int]] = json.loads(text).get(device_kind, [])
    return found
