"""What the merge through Mosaic GPU is compiled for."""

import dataclasses

from mustafar_jax.pallas_kernels import launch

TILE = 16
"""Dense slots that a warp takes at a time."""
_HEADS = 8
"""Query heads that a block can take: columns of a product."""
_LOADS = 4
"""Rows of splits, one of each query head, that a warp has on their way at a time, or one split: registers are few."""


def queries_per_block(*, heads: int, group: int, slots: int, splits: int) -> int:
    """A divisor of the group: that with which a multiprocessor reads the fewest rows, in whole waves of blocks."""

    def rows(queries: int) -> int:
        return -(-heads * group // queries // launch.cores()) * (slots + queries * splits)

    return min((n for n in range(min(group, _HEADS), 0, -1) if group % n == 0), key=rows)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is compiled for. Scores are taken to base 2.

    Attributes:
        queries: query heads of a block, which divide the group.
        slots, sinks: as in `Tail`.
        splits: how many; 0 for none.
        turned: whether what the splits sum up is held as `rotation.turn` gives it.
        return_lse: whether the log-sum-exp of the scores is a result, too.
    """

    head_dim: int
    group: int
    kv_heads: int
    queries: int
    slots: int
    sinks: int
    splits: int
    scale: float
    window: int | None
    turned: bool = False
    return_lse: bool = False

    @property
    def shares(self) -> int:
        """Blocks of a KV head."""
        return self.group // self.queries

    @property
    def ring(self) -> int:
        """Slots of recent tokens."""
        return self.slots - self.sinks

    @property
    def tiles(self) -> int:
        """Tiles of dense slots."""
        return -(-self.slots // TILE)

    @property
    def warps(self) -> int:
        """Of a block: up to 16, so that a warp has one tile; from 8 on, so that it has few splits."""
        return min(16, max(8, -(-self.tiles // 4) * 4))

    @property
    def splits_at_once(self) -> int:
        """Splits that a warp loads together."""
        return min(max(1, _LOADS // self.queries), -(-self.splits // self.warps))

    @property
    def of_slots(self) -> int:
        """Parts that warps make of dense slots."""
        return min(self.warps, self.tiles)

    @property
    def parts(self) -> int:
        """Parts that meet in shared memory: those of slots, then those of splits."""
        return self.of_slots + min(self.warps, self.splits)

    @property
    def row_bytes(self) -> int:
        """Of a query head's part in shared memory: out [H], then m and l; places for two more move the banks."""
        return self.head_dim * 4 + 16

    @property
    def part_bytes(self) -> int:
        """Of a part."""
        return self.queries * self.row_bytes

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.parts * self.part_bytes
