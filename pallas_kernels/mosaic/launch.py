"""Launch parameters of decode attention through Mosaic GPU: explicit, else tuned for this device, else a heuristic."""

import dataclasses
import functools
import math

from mustafar_jax.pallas_kernels import launch

_PER_CORE = 2
"""Blocks of 4 warps that a multiprocessor of an H100 or H200 holds at once."""
_START = 3
"""What starting and ending such a block costs, in tiles; a guess."""
_WIDE = 12
"""Warps of a block that has a multiprocessor to itself, in place of two blocks of 4: 168 registers a thread."""
_CODED = 16
"""Warps of such a block where keys and values are codes, and 128 registers suffice."""


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


def mosaic_params(*, heads: int, rows: int, group: int, slots: int) -> MosaicParams:
    """Launch parameters from static facts alone.

    Those of wide blocks, where they are faster, are computed; those of blocks of 4 warps are tuned.json's, as in
    `triton.launch.decode_params`, else computed.

    Args:
        heads: sequences times KV heads.
        rows: packed rows per sequence.
        group: query heads per KV head.
        slots: of a row of keys and one of values together, a dense row counting as twice its entries.
    """
    tiles = max(1, -(-rows // launch.TILE))
    if _is_wide(heads, tiles, group, slots):
        return MosaicParams(launch.cheapest(heads, tiles, functools.partial(_cost, warps=_WIDE)), _WIDE)
    return MosaicParams(launch.tuned_or_cheapest("mosaic_gpu", heads, rows, _cost))


def coded_params(*, heads: int, rows: int, group: int, centred: bool) -> MosaicParams:
    """Launch parameters where keys and values are codes, from static facts alone; arguments as in `mosaic_params`.

    A multiprocessor has one block: as many warps as registers suffice for keep as many loads on their way.
    """
    warps = _CODED if group <= 8 and not centred else _WIDE
    tiles = max(1, -(-rows // launch.TILE))
    return MosaicParams(launch.cheapest(heads, tiles, functools.partial(_cost, warps=warps)), warps)


def wave() -> int:
    """Blocks that the GPU holds at once."""
    return launch.cores() * _PER_CORE


def _is_wide(heads: int, tiles: int, group: int, slots: int) -> bool:
    """Whether wide blocks are faster: where registers suffice, and each warp has 12 units of 32 tokens or more.

    As measured on an H100, for packed keys and values (docs/kernels.md).
    """
    return group <= 8 and slots <= 96 and heads * tiles * 4 >= 12 * _WIDE * launch.cores()


def _cost(heads: int, tiles: int, splits: int, *, warps: int = 4) -> float:
    """Tiles that 4 warps of a block take one after the other, in whole waves of blocks."""
    at_once = launch.cores() if warps >= _WIDE else wave()
    share = math.ceil(-(-tiles // splits) * 4 / warps)
    return -(-heads * splits // at_once) * (share + _START)
