"""Rows of one KV head on their way from global memory: packed or dense ones to a tile, codes to products."""

from typing import Any

from mustafar_jax import layout as layout_of
from mustafar_jax.pallas_kernels.mosaic.plan import ROW, TOKENS, Layout, Places, Plan
from mustafar_jax.pallas_kernels.mosaic.scatter import scatter
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp


class PackedSource:
    """Packed rows of one KV head in global memory. A lane reads its token's row in pieces of one chunk of slots."""

    def __init__(self, w: Warp, bitmap: Any, values: Any, head: Register, layout: Layout, plan: Plan) -> None:
        self.words, self.slots = plan.words, layout.slots
        self.chunk = layout_of.chunk(self.slots)
        self.bitmap = w.row(bitmap, head, layout.rows * plan.words * 4)
        self.values = w.row(values, head, layout.rows * self.slots * 2)
        self.registers = plan.words + self.slots // 2

    def load(self, w: Warp, unit: Register, at: Places, where: Register) -> list[Register]:
        """Begin to load a unit's rows into registers; undefined where not `where`."""
        words = w.load(self.bitmap, (unit * TOKENS + at.token) * (4 * self.words), self.words, where=where)
        offset = unit * (TOKENS * self.slots * 2) + at.token * (2 * self.chunk)
        for i in range(self.slots // self.chunk):
            words += w.load(self.values, offset, self.chunk // 2, i * TOKENS * self.chunk * 2, where=where)
        return words

    def unpack(
        self, w: Warp, registers: list[Register], _unit: Register, seen: Register, at: Places, plan: Plan
    ) -> None:
        """Store what was loaded in the tile."""
        scatter(w, registers[: self.words], registers[self.words : self.registers], seen, at, plan)


class DenseSource:
    """Dense rows of one KV head in global memory. They are not loaded ahead: that would take too many registers."""

    registers = 0

    def __init__(self, w: Warp, ref: Any, head: Register, layout: Layout, plan: Plan) -> None:
        self.rows = layout.rows
        self.ref = w.row(ref, head, layout.rows * plan.head_dim * 2)

    def load(self, _w: Warp, _unit: Register, _at: Places, _where: Register) -> list[Register]:
        """Load nothing yet."""
        return []

    def unpack(
        self, w: Warp, _registers: list[Register], unit: Register, seen: Register, at: Places, plan: Plan
    ) -> None:
        """Copy a unit's rows to the tile, a row per lane; zeros for tokens that are not seen."""
        row = smaller(w, unit * TOKENS + at.token, w.integer(self.rows - 1)) * (plan.head_dim * 2)
        column = at.tile + (at.lane << 2)
        for pair in range(0, plan.pairs, 8):
            low, high = (w.load(self.ref, row, 4, 2 * channel) for channel in (pair, pair + plan.pairs))
            for i in range(8):
                word = w.pick_halves(low[i // 2], high[i // 2], i % 2)
                w.store_shared(column, [w.select(seen, word, w.integer(0))], (pair + i) * ROW)


class CodedSource:
    """Codes of whole rows of one KV head in global memory. A lane reads its words of each product, and its scales."""

    def __init__(self, w: Warp, payload: Any, scale: Any, head: Register, layout: Layout, plan: Plan) -> None:
        _, self.vectors, _, self.vector = layout_of.coded_shape(TOKENS, plan.head_dim, layout.bits)
        self.words = self.vectors * self.vector
        self.payload = w.row(payload, head, layout.rows * self.words * 4)
        self.scale = w.row(scale, head, layout.rows * 2)
        self.registers = self.words + 2

    def load(self, w: Warp, unit: Register, at: Places, where: Register) -> list[Register]:
        """Begin to load a unit's words, then its scales; undefined where not `where`."""
        words, size = [], 4 * self.vector
        offset = unit * (TOKENS * 4 * self.words) + at.lane * size
        for i in range(self.vectors):
            words += w.load(self.payload, offset, self.vector, i * TOKENS * size, where=where)
        return words + w.load(self.scale, (unit << 6) + (at.g << 3), 2, where=where)


TileSource = PackedSource | DenseSource
Source = TileSource | CodedSource


def source(w: Warp, inputs: list[Any], head: Register, layout: Layout, plan: Plan) -> Source:
    """Rows of a KV head; takes their arrays off the front of `inputs`."""
    if layout.bits:
        return CodedSource(w, inputs.pop(0), inputs.pop(0), head, layout, plan)
    if layout.slots == 0:
        return DenseSource(w, inputs.pop(0), head, layout, plan)
    return PackedSource(w, inputs.pop(0), inputs.pop(0), head, layout, plan)


def smaller(w: Warp, a: Register, b: Register) -> Register:
    """Of two uint32."""
    return w.select(a < b, a, b)
