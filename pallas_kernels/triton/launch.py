"""Launch parameters of the Triton kernels: explicit, else tuned for this device, else a heuristic."""

import dataclasses

from mustafar_jax.pallas_kernels import launch

_PER_CORE = 4
"""Blocks that a multiprocessor of an H100 or H200 holds at once, or nearly: centred keys cost registers."""


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
    return DecodeParams(launch.tuned_or_cheapest("triton", heads, rows, _cost))


def wave() -> int:
    """Blocks that the GPU holds at once."""
    return launch.cores() * _PER_CORE


def _cost(heads: int, tiles: int, splits: int) -> float:
    """Tiles that a place for a block works through: its share, and at the end half a block in which others are idle.

    Starting a block costs about as much as a tile.
    """
    block = -(-tiles // splits) + 1
    return max(heads * splits / wave(), 1) * block + block / 2
