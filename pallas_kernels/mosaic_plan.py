"""What decode attention through Mosaic GPU is compiled for, and what each of its warps has in shared memory."""

import dataclasses

from mustafar_jax.pallas_kernels.rows import WORD, Packed, Rows, row_count
from mustafar_jax.pallas_kernels.warp import LANES, Register, Warp

TOKENS = LANES
"""Tokens of a unit, one per lane."""
ROW = 4 * TOKENS
"""Bytes of a pair of channels in a tile: a word for each token."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of keys or of values are held. Static.

    Attributes:
        rows: of each KV head.
        slots: of a packed row; 0 for dense rows.
    """

    rows: int
    slots: int


def layout(rows: Rows) -> Layout:
    """Of rows as `attend_rows` takes them."""
    slots = rows.values.shape[-3] * rows.values.shape[-1] if isinstance(rows, Packed) else 0
    return Layout(row_count(rows), slots)


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
    centred: bool = False

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
    def parities(self) -> int:
        """Classes of tokens that a product with values keeps apart, where its 8 columns outnumber the heads."""
        return 2 if self.group <= 4 else 1

    @property
    def tile_bytes(self) -> int:
        """Of one tile."""
        return self.pairs * ROW

    @property
    def scores_bytes(self) -> int:
        """Of the parts of scores [G, 4, TOKENS], float32."""
        return self.group * 4 * TOKENS * 4

    @property
    def warp_bytes(self) -> int:
        """A warp's share of memory: its tile, parts of scores, weights [heads, TOKENS] of 16 bits, steps of means."""
        return self.tile_bytes + self.scores_bytes + self.weights_bytes + self.centred * self.pairs * 32

    @property
    def weights_bytes(self) -> int:
        """Of the weights [heads, TOKENS], 16 bits each."""
        return 8 * self.octets * TOKENS * 2


@dataclasses.dataclass(frozen=True)
class Places:
    """Addresses that a warp uses throughout.

    Attributes:
        tile, scores, weights, steps: where its parts of shared memory begin: see `Plan.warp_bytes`.
        lane, g, t: numbers of this lane.
    """

    tile: Register
    scores: Register
    weights: Register
    steps: Register
    lane: Register
    g: Register
    t: Register

    @property
    def first_quad(self) -> Register:
        """The first of the two quads of tokens that this lane fills with a mean: see `begin_mean`."""
        return self.t + ((self.g & 1) << 2)

    @property
    def pair_of_heads(self) -> Register:
        """N where this lane holds queries of heads 2 n and 2 n + 1 of an octet: see `load_query`."""
        return (self.t + 4 - (self.g >> 1)) & 3

    @staticmethod
    def of(w: Warp, shared: Register, plan: Plan) -> "Places":
        """Places of warp w in memory that begins at `shared`."""
        lane = w.lane()
        tile = shared + w.warp() * plan.warp_bytes
        scores = tile + plan.tile_bytes
        weights = scores + plan.scores_bytes
        return Places(tile, scores, weights, weights + plan.weights_bytes, lane, lane >> 2, lane & 3)
