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
_TEAMS = 4
"""Blocks of 4 warps that share a multiprocessor where keys or values are codes: 128 registers a thread."""
_FULL = 0.9
"""The share of multiprocessors that wide blocks of codes must fill at once."""


@dataclasses.dataclass(frozen=True)
class MosaicParams:
    """How decode attention through Mosaic GPU is launched.

    Attributes:
        splits: blocks that share the tokens of one KV head.
        warps: per block, a multiple of 4; each takes 32 tokens at a time.
        teams: blocks that are launched as one, of 4 to 32 warps together; see `lowering.kernel_call`.
    """

    splits: int
    warps: int = 4
    teams: int = 1

    def __post_init__(self) -> None:
        if self.splits < 1 or self.warps < 4 or self.warps % 4:
            raise ValueError(f"{self} must have at least one split, and a multiple of 4 warps")
        if not 1 <= self.teams <= 32 // self.warps:
            raise ValueError(f"{self} must have at least one team, and at most 32 warps together")


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
        cost = functools.partial(_cost, warps=_WIDE, at_once=launch.cores())
        return MosaicParams(launch.cheapest(heads, tiles, cost), _WIDE)
    return MosaicParams(launch.tuned_or_cheapest("mosaic_gpu", heads, rows, functools.partial(_cost, at_once=wave())))


def coded_params(*, heads: int, rows: int, group: int, head_dim: int, words: int | None, centred: bool) -> MosaicParams:
    """Launch parameters where keys or values are codes, from static facts alone.

    A multiprocessor has one launched block, of as many teams as registers suffice for: the more warps, the more loads
    are on their way. Where one wave of wide blocks fills the device, and each warp has 2 units or more, they are faster
    by what starting a block costs. As measured on an H200 (docs/kernels.md).

    Args:
        heads, rows, group: as in `mosaic_params`.
        head_dim: channels of a head.
        words: of a unit's keys and values that a lane loads; None where one side is no codes.
        centred: whether keys are.
    """
    tiles = max(1, -(-rows // launch.TILE))
    small = words is not None and words <= 32 and group <= 8
    wide = launch.cores() // heads
    if small and head_dim > 64 and heads * wide >= _FULL * launch.cores() and tiles * 4 >= wide * _WIDE * 2:
        return MosaicParams(wide, _WIDE)
    teams = _teams(group, head_dim, words, centred=centred)
    forms = [(4, teams)] + [(8, teams // 2)] * small
    found = []
    for warps, teams in forms:
        cost = functools.partial(_cost, warps=warps, at_once=launch.cores() * teams)
        splits = launch.cheapest(heads, tiles, cost)
        found.append((cost(heads, tiles, splits), -warps, splits, teams))
    _, warps, splits, teams = min(found)
    return MosaicParams(splits, -warps, min(teams, -(-heads * splits // launch.cores())))


def _teams(group: int, head_dim: int, words: int | None, *, centred: bool) -> int:
    """Blocks of 4 warps that registers suffice for; arguments as `coded_params`."""
    if words is None:
        return 2 if head_dim > 64 else _TEAMS
    if group > 8:
        return 2 if centred and head_dim > 64 else 3
    return _TEAMS if words <= 32 else _TEAMS - 1


def wave() -> int:
    """Blocks that the GPU holds at once."""
    return launch.cores() * _PER_CORE


def _is_wide(heads: int, tiles: int, group: int, slots: int) -> bool:
    """Whether wide blocks are faster: where registers suffice, and each warp has 12 units of 32 tokens or more.

    As measured on an H100, for packed keys and values (docs/kernels.md).
    """
    return group <= 8 and slots <= 96 and heads * tiles * 4 >= 12 * _WIDE * launch.cores()


def _cost(heads: int, tiles: int, splits: int, *, at_once: int, warps: int = 4) -> float:
    """Tiles that 4 warps of a block take one after the other, in whole waves of so many blocks."""
    share = math.ceil(-(-tiles // splits) * 4 / warps)
    return -(-heads * splits // at_once) * (share + _START)
