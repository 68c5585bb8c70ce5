"""Rows of one KV head on their way from global memory: packed or dense ones to a tile, codes to products."""

import math
from typing import Any

from mustafar_jax import layout as layout_of
from mustafar_jax.pallas_kernels.mosaic import codes
from mustafar_jax.pallas_kernels.mosaic.plan import ROW, TOKENS, Layout, Places, Plan
from mustafar_jax.pallas_kernels.mosaic.scatter import scatter
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp


class PackedSource:
    """Packed rows of one KV head in global memory.

    Lane i reads the row of token i, in pieces of 4 to 16 bytes: neighbours read what stands side by side.
    """

    def __init__(self, w: Warp, arrays: list[Any], head: Register, layout: Layout, plan: Plan) -> None:
        self.layout, self.bitmap_words = layout, plan.words
        self.words = layout.slots * (layout.bits or 16) // layout_of.WORD
        self.vector = math.gcd(4, self.words) if layout.bits else layout_of.chunk(layout.slots) // 2
        bitmap, payload, *scale = arrays
        self.bitmap = w.row(bitmap, head, layout.rows * plan.words * 4)
        self.payload = w.row(payload, head, layout.rows * self.words * 4)
        self.scale = [w.row(x, head, layout.rows * 2) for x in scale]
        self.registers = plan.words + self.words + 2 * len(scale)

    def load(self, w: Warp, unit: Register, at: Places, where: Register) -> list[Register]:
        """Begin to load a unit's bitmap and words; undefined where not `where`."""
        words = w.load(self.bitmap, (unit * TOKENS + at.lane) * (4 * self.bitmap_words), self.bitmap_words, where=where)
        size = 4 * self.vector
        offset = unit * (TOKENS * 4 * self.words) + at.lane * size
        for i in range(self.words // self.vector):
            words += w.load(self.payload, offset, self.vector, i * TOKENS * size, where=where)
        return words

    def load_scales(self, w: Warp, unit: Register, at: Places, where: Register) -> list[Register]:
        """Begin to load a unit's scales, if there are any."""
        return [x for scale in self.scale for x in _load_scales(w, scale, unit, at, where)]

    def unpack(
        self, w: Warp, registers: list[Register], _unit: Register, seen: Register, at: Places, plan: Plan
    ) -> None:
        """Store what was loaded in the tile; codes as `codes.magnitudes` gives them."""
        bitmap, payload = registers[: plan.words], registers[plan.words :][: self.words]
        entries = codes.magnitudes(payload) if self.layout.bits else [(x, half) for x in payload for half in (0, 1)]
        scatter(w, bitmap, entries, self.layout.usual, seen, at, plan)


class DenseSource:
    """Dense rows of one KV head in global memory. They are not loaded ahead: that would take too many registers."""

    registers = 0

    def __init__(self, w: Warp, arrays: list[Any], head: Register, layout: Layout, plan: Plan) -> None:
        self.rows = layout.rows
        self.ref = w.row(arrays[0], head, layout.rows * plan.head_dim * 2)

    def load(self, _w: Warp, _unit: Register, _at: Places, _where: Register) -> list[Register]:
        """Load nothing yet."""
        return []

    def load_scales(self, _w: Warp, _unit: Register, _at: Places, _where: Register) -> list[Register]:
        """There are none."""
        return []

    def unpack(
        self, w: Warp, _registers: list[Register], unit: Register, seen: Register, at: Places, plan: Plan
    ) -> None:
        """Copy a unit's rows to the tile, a row per lane; zeros for tokens that are not seen."""
        row = smaller(w, unit * TOKENS + at.lane, w.integer(self.rows - 1)) * (plan.head_dim * 2)
        column = at.tile + (at.column << 2)
        for pair in range(0, plan.pairs, 8):
            low, high = (w.load(self.ref, row, 4, 2 * channel) for channel in (pair, pair + plan.pairs))
            for i in range(8):
                word = w.pick_halves(low[i // 2], high[i // 2], i % 2)
                w.store_shared(column, [w.select(seen, word, w.integer(0))], (pair + i) * ROW)


class CodedSource:
    """Codes of whole rows of one KV head in global memory. A lane reads its words of each product, and its scales."""

    def __init__(self, w: Warp, arrays: list[Any], head: Register, layout: Layout, plan: Plan) -> None:
        payload, scale = arrays
        _, self.vectors, _, self.vector = layout_of.coded_shape(TOKENS, plan.head_dim, layout.bits)
        self.words = self.vectors * self.vector
        self.payload = w.row(payload, head, layout.rows * self.words * 4)
        self.scale = w.row(scale, head, layout.rows * 2)
        self.registers = self.words + 2

    def load(self, w: Warp, unit: Register, at: Places, where: Register) -> list[Register]:
        """Begin to load a unit's words; undefined where not `where`."""
        words, size = [], 4 * self.vector
        offset = unit * (TOKENS * 4 * self.words) + at.lane * size
        for i in range(self.vectors):
            words += w.load(self.payload, offset, self.vector, i * TOKENS * size, where=where)
        return words

    def load_scales(self, w: Warp, unit: Register, at: Places, where: Register) -> list[Register]:
        """Begin to load a unit's scales."""
        return _load_scales(w, self.scale, unit, at, where)


def _load_scales(w: Warp, scale: Any, unit: Register, at: Places, where: Register) -> list[Register]:
    """Begin to load the scales of tokens g, g + 8, g + 16 and g + 24: two words, see `codes.row_scales`."""
    return w.load(scale, (unit << 6) + (at.g << 3), 2, where=where)


TileSource = PackedSource | DenseSource
Source = TileSource | CodedSource


def source(w: Warp, inputs: list[Any], head: Register, layout: Layout, plan: Plan) -> Source:
    """Rows of a KV head; takes their arrays off the front of `inputs`."""
    kind = CodedSource if layout.is_direct else PackedSource if layout.slots else DenseSource
    count = 1 + (layout.slots > 0) + (layout.bits > 0)
    arrays = [inputs.pop(0) for _ in range(count)]
    return kind(w, arrays, head, layout, plan)


def smaller(w: Warp, a: Register, b: Register) -> Register:
    """Of two uint32."""
    return w.select(a < b, a, b)
