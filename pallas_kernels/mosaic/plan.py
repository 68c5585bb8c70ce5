"""What decode attention through Mosaic GPU is compiled for, and what each of its warps has in memory and registers."""

import dataclasses

from mustafar_jax.layout import WORD, round_slots
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp
from mustafar_jax.rows import Rows

TOKENS = LANES
"""Tokens of a unit, one per lane."""
MOST_UNITS = 1024
"""Units of a launched block's teams whose scores of a mean's slow pairs are held: 32 KB of them for up to 8 heads."""
ROW = 4 * TOKENS
"""Bytes of a pair of channels in a tile: a word for each token."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of keys or of values are held. Static.

    Attributes:
        rows: of each KV head.
        slots: of a row with a bitmap, entries that it has room for; 0 for rows without one.
        usual: entries of a row with a bitmap that is not an unusual one: its slots, or, of codes, a word's less.
        bits: of a code; 0 for plain numbers.
    """

    rows: int
    slots: int
    usual: int = 0
    bits: int = 0

    @property
    def is_direct(self) -> bool:
        """Whether rows go straight into products, as codes of every entry do; all others go through a tile."""
        return self.bits > 0 and self.slots == 0


def layout(rows: Rows) -> Layout:
    """Of rows as `attend_rows` takes them."""
    bits = rows.codec.bits or 0
    if rows.bitmap is None:
        return Layout(rows.padded_length, 0, bits=bits)
    assert rows.format.slots
    return Layout(rows.padded_length, rows.slots, round_slots(rows.format.slots), bits)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel is compiled for. Sizes in bytes and tokens; scores are taken to base 2."""

    head_dim: int
    group: int
    kv_heads: int
    rows: int
    key: Layout
    value: Layout
    splits: int
    warps: int
    scale: float
    fast_pairs: int = 0
    turned_keys: bool = False

    @property
    def centred(self) -> bool:
        """Whether keys are distances from a mean, of which at least some pairs are fast: see `mean`."""
        return self.fast_pairs > 0

    @property
    def slow_pairs(self) -> int:
        """Pairs of a mean that are rotated to the middle of a unit."""
        return self.pairs - self.fast_pairs if self.centred else 0

    @property
    def pairs(self) -> int:
        """Pairs of channels (p, p + pairs) that share a word of a tile."""
        return self.head_dim // 2

    @property
    def words(self) -> int:
        """Words of a row's bitmap."""
        return self.head_dim // WORD

    @property
    def units(self) -> int:
        """Units of a KV head."""
        return self.rows // TOKENS

    @property
    def units_per_split(self) -> int:
        """Units that a block takes."""
        return -(-self.units // self.splits)

    @property
    def octets(self) -> int:
        """Groups of up to 8 query heads."""
        return -(-self.group // 8)

    @property
    def many_heads(self) -> bool:
        """Which products: see `products`."""
        return self.group > 2 or self.key.bits > 0 or self.value.bits > 0

    @property
    def has_tile(self) -> bool:
        """Whether keys or values go through a tile."""
        return not (self.key.is_direct and self.value.is_direct)

    @property
    def tiles(self) -> int:
        """Tiles of 16 channels that a product takes at a time."""
        return self.head_dim // 16

    @property
    def sums(self) -> int:
        """Products that values are added to: of each 16 channels; where they are codes, one for their middle."""
        return self.tiles + self.value.is_direct

    @property
    def statistics(self) -> int:
        """Registers that hold a lane's m, and its l."""
        return 2 * self.octets if self.many_heads else self.group

    @property
    def tile_bytes(self) -> int:
        """Of one tile, which has room for a warp's result of 16 heads; of such a result where there is none."""
        return self.pairs * ROW if self.has_tile else 8 * self.octets * self.head_dim * 4

    @property
    def scores_bytes(self) -> int:
        """Of the parts of scores [G, 4, TOKENS], float32, where they go through memory; room for m and l [2, 16]."""
        return 2 * 16 * 4 if self.many_heads else self.group * 4 * TOKENS * 4

    @property
    def warp_bytes(self) -> int:
        """A warp's share of memory: its tile, parts of scores, weights [4, TOKENS] of 16 bits, turned queries."""
        return self.tile_bytes + self.scores_bytes + self.weights_bytes + self.turned_bytes

    @property
    def weights_bytes(self) -> int:
        """Of the weights [4, TOKENS], 16 bits each, where they go through memory.

        A product's columns are of 4 heads: what it reads for those that there are not is dropped in the end.
        """
        return 0 if self.many_heads else 4 * TOKENS * 2

    @property
    def pieces(self) -> int:
        """Pieces of a head's fast pairs, 4 pairs each: see `mean`."""
        return self.fast_pairs // 4

    @property
    def column_heads(self) -> int:
        """Query heads that columns of the mean's product repeat: a power of two."""
        return 1 << (self.group - 1).bit_length()

    @property
    def turned_heads(self) -> int:
        """Query heads that a warp turns where keys are centred, a power of two: a piece per lane at a time."""
        return max(LANES // self.pieces, self.column_heads)

    @property
    def turned_stride(self) -> int:
        """Bytes from one turned query to the next: an odd number of halves of all banks, so neighbours meet in none."""
        return self.fast_pairs * 4 | 64

    @property
    def turned_bytes(self) -> int:
        """Of a warp's turned queries."""
        return self.turned_heads * self.turned_stride if self.centred else 0

    @property
    def table_bytes(self) -> int:
        """Of the mean key's fast pairs, rotated to each token of a unit, which a block's warps share."""
        return self.fast_pairs * ROW

    @property
    def queries_bytes(self) -> int:
        """Of the queries' fast pairs in float32, which a block's warps share: all low channels, then all high ones."""
        return 8 * self.octets * self.fast_pairs * 8

    @property
    def slow_rows(self) -> int:
        """Units of a block, in whole products of 16."""
        return -(-self.units_per_split // 16) * 16

    @property
    def slow_stride(self) -> int:
        """Bytes of a unit's scores of slow pairs, one for each query head."""
        return 32 * self.octets

    @property
    def slow_bytes(self) -> int:
        """Of the scores of slow pairs, which a block's warps share."""
        return (self.slow_pairs > 0) * self.slow_rows * self.slow_stride

    @property
    def shared_bytes(self) -> int:
        """Of a block: its warps' shares, then what they share."""
        of_mean = self.table_bytes + self.queries_bytes + self.slow_bytes
        staged = self.group * self.query_stride + self.centred * self.head_dim * 4
        return self.warps * self.warp_bytes + of_mean + self.coded_queries_bytes + staged

    @property
    def query_stride(self) -> int:
        """Bytes from one query to the next, as it came or for codes: 8 neighbours meet all banks.

        Of a query for codes, two factors follow the channels.
        """
        return self.head_dim * 2 + 16

    @property
    def coded_queries_bytes(self) -> int:
        """Of the queries for codes, which a block's warps share."""
        return (self.key.bits > 0) * self.group * self.query_stride


@dataclasses.dataclass(frozen=True)
class Places:
    """Addresses that a warp uses throughout.

    Attributes:
        tile, scores, weights, turned: where its parts of shared memory begin: see `Plan.warp_bytes`.
        table, queries, slow, coded_queries, staged_queries, staged_mean: where what the block's warps share begins: see
            `Plan.shared_bytes`.
        first_unit: of the block.
        token: of a unit, in column `lane` of the tile; as `layout.to_lanes` orders them, quad g has tokens 8 i + g.
        column: of the tile, that holds token `lane`.
        lane, g, t: numbers of this lane.
    """

    tile: Register
    scores: Register
    weights: Register
    turned: Register
    table: Register
    queries: Register
    slow: Register
    coded_queries: Register
    staged_queries: Register
    staged_mean: Register
    first_unit: Register
    token: Register
    column: Register
    lane: Register
    g: Register
    t: Register

    @staticmethod
    def of(w: Warp, shared: Register, plan: Plan) -> "Places":
        """Places of warp w in memory that begins at `shared`."""
        lane = w.lane()
        tile = shared + w.warp() * plan.warp_bytes
        scores = tile + plan.tile_bytes
        weights = scores + plan.scores_bytes
        turned = weights + plan.weights_bytes
        table = shared + plan.warps * plan.warp_bytes
        queries = table + plan.table_bytes
        slow = queries + plan.queries_bytes
        coded = slow + plan.slow_bytes
        staged = coded + plan.coded_queries_bytes
        mean = staged + plan.group * plan.query_stride
        first = w.block() % plan.splits * plan.units_per_split
        token, column = ((lane & 3) << 3) + (lane >> 2), ((lane & 7) << 2) + (lane >> 3)
        of_block = table, queries, slow, coded, staged, mean
        return Places(tile, scores, weights, turned, *of_block, first, token, column, lane, lane >> 2, lane & 3)


@dataclasses.dataclass
class State:
    """Softmax so far, in registers.

    Attributes:
        m: a score of each head, that none so far exceeds by more than a little; see `products`. With few heads
            one register per head, the same in all lanes; with many two per octet, of its heads 2 t and 2 t + 1.
        l: this lane's sum of weights of each head, or of heads 2 t and 2 t + 1 of each octet.
        out: sums [`Plan.sums`][octets][4], the accumulators of products with values.
    """

    m: list[Register]
    l: list[Register]  # noqa: E741
    out: list[list[list[Register]]]

    @staticmethod
    def empty(w: Warp, lowest: float, plan: Plan) -> "State":
        """Of no tokens."""
        out = [[[w.number(0)] * 4 for _ in range(plan.octets)] for _ in range(plan.sums)]
        return State([w.number(lowest)] * plan.statistics, [w.number(0)] * plan.statistics, out)

    def flat(self) -> list[Register]:
        """All registers in order."""
        return [*self.m, *self.l, *(x for block in self.out for part in block for x in part)]

    @staticmethod
    def from_flat(registers: list[Register], plan: Plan) -> "State":
        """The inverse of `flat`."""
        n = plan.statistics
        m, l, rest = registers[:n], registers[n : 2 * n], registers[2 * n :]  # noqa: E741
        parts = [rest[i : i + 4] for i in range(0, len(rest), 4)]
        return State(m, l, [parts[i : i + plan.octets] for i in range(0, len(parts), plan.octets)])

    def rescaled(self, m: list[Register], decay: list[Register], columns: list[list[Register]]) -> "State":
        """Relative to new m: l times `decay`, of the same heads, and sums times `columns` [octets][4]."""
        l = [a * b for a, b in zip(self.l, decay, strict=True)]  # noqa: E741
        out = [
            [[x * f for x, f in zip(*both, strict=True)] for both in zip(block, columns, strict=True)]
            for block in self.out
        ]
        return State(m, l, out)
