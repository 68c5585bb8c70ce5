"""Launch parameters of the kernels: explicit, else tuned for this device, else a heuristic."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """How decode attention is launched.

    Attributes:
        splits: blocks that share the tokens of one KV head, each its own run of whole tiles.
    """

    splits: int


TARGET_BLOCKS = 132 * 5 * 3


def decode_params(*, heads: int, rows: int) -> DecodeParams:
    """Launch parameters from static shapes alone.

    Args:
        heads: sequences times KV heads.
        rows: packed rows per sequence.
    """
    tiles = max(1, -(-rows // 128))
    return DecodeParams(splits=max(1, min(tiles, TARGET_BLOCKS // heads)))


@dataclasses.dataclass(frozen=True)
class MosaicParams:
    """How decode attention through Mosaic GPU is launched.

    Attributes:
        splits: blocks that share the tokens of one KV head.
        warps: per block, a multiple of 4; each takes 32 tokens at a time.
    """

    splits: int
    warps: int = 4


BLOCKS_AT_ONCE = 132 * 2
"""Blocks of `MosaicParams.warps` warps that a Hopper GPU holds: one wave of them, since each starts and ends slowly."""


def mosaic_params(*, heads: int, rows: int) -> MosaicParams:
    """Launch parameters from static shapes alone.

    Args:
        heads: sequences times KV heads.
        rows: packed rows per sequence.
    """
    units = max(1, rows // 32)
    return MosaicParams(splits=max(1, min(units // 4, BLOCKS_AT_ONCE // heads)))
