"""The two ways of a unit's keys and values from registers to sums: through the tile, or, as codes, at once.

Either side takes a unit's registers, which are then free to be loaded again, and gives its result afterwards.
"""

from typing import Protocol

from mustafar_jax.pallas_kernels.mosaic import codes
from mustafar_jax.pallas_kernels.mosaic.coded_query import CodedQuery
from mustafar_jax.pallas_kernels.mosaic.mean import MeanKey
from mustafar_jax.pallas_kernels.mosaic.plan import Places, Plan, State
from mustafar_jax.pallas_kernels.mosaic.products import Products
from mustafar_jax.pallas_kernels.mosaic.sources import CodedSource, Source, TileSource
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp


class Keys(Protocol):
    """Of one warp."""

    def take(self, registers: list[Register], unit: Register, seen: Register) -> list[Register]:
        """Use what was loaded; what `scores` wants."""

    def scores(self, taken: list[Register], unit: Register) -> list[Register]:
        """What `Products.weigh` wants. Other lanes' shared memory has been waited for."""


class Values(Protocol):
    """Of one warp."""

    def scales(self, registers: list[Register]) -> list[Register]:
        """Of the lane's 4 tokens where values are codes, else none."""

    def take(
        self, registers: list[Register], state: State, weights: list[Register], unit: Register, seen: Register
    ) -> None:
        """Use what was loaded."""

    def add(self, state: State, weights: list[Register]) -> None:
        """Have weights times values added to the sums. Other lanes' shared memory has been waited for."""


class TileKeys(Keys):
    """Keys that go through the tile."""

    def __init__(
        self, source: TileSource, query: list[Register], multiply: Products, w: Warp, at: Places, plan: Plan
    ) -> None:
        self.source, self.query, self.multiply, self.w, self.at, self.plan = source, query, multiply, w, at, plan

    def take(self, registers: list[Register], unit: Register, seen: Register) -> list[Register]:
        """See `Keys`."""
        self.source.unpack(self.w, registers, unit, seen, self.at, self.plan)
        return []

    def scores(self, taken: list[Register], unit: Register) -> list[Register]:
        """See `Keys`."""
        return self.multiply.multiply_keys(self.query, unit)


class CodedKeys(Keys):
    """Keys as codes, of every entry or behind a bitmap; the mean's part of the scores is a product of its own."""

    def __init__(self, source: Source, query: CodedQuery, multiply: Products, w: Warp, at: Places, plan: Plan) -> None:
        self.source, self.query, self.multiply, self.w, self.at, self.plan = source, query, multiply, w, at, plan
        self.factors = query.factors()
        self.fragments = [] if plan.key.is_direct else query.tile_fragments()

    def take(self, registers: list[Register], unit: Register, seen: Register) -> list[Register]:
        """See `Keys`: products, unless they are still to come from the tile, and two words of scales."""
        *words, low, high = registers
        if isinstance(self.source, CodedSource):
            return [*codes.multiply_keys(self.w, words, self.query.fragments(), self.plan), low, high]
        self.source.unpack(self.w, words, unit, seen, self.at, self.plan)
        return [low, high]

    def scores(self, taken: list[Register], unit: Register) -> list[Register]:
        """See `Keys`."""
        w, plan = self.w, self.plan
        *products, low, high = taken
        products = products or self.multiply.multiply_keys(self.fragments, unit)
        found = codes.scores(w, products, codes.row_scales(w, [low, high]), self.factors, plan)
        if not plan.centred:
            return found
        scale = w.number(plan.scale)
        of_mean = [x for octet in range(plan.octets) for part in self.multiply.mean_sums(unit, octet) for x in part]
        return [w.fused(x, scale, y) for x, y in zip(of_mean, found, strict=True)]


class TileValues(Values):
    """Values that go through the tile."""

    def __init__(self, source: TileSource, multiply: Products, w: Warp, at: Places, plan: Plan) -> None:
        self.source, self.multiply, self.w, self.at, self.plan = source, multiply, w, at, plan

    def scales(self, registers: list[Register]) -> list[Register]:
        """See `Values`."""
        return []

    def take(
        self, registers: list[Register], state: State, weights: list[Register], unit: Register, seen: Register
    ) -> None:
        """See `Values`."""
        self.source.unpack(self.w, registers, unit, seen, self.at, self.plan)

    def add(self, state: State, weights: list[Register]) -> None:
        """See `Values`."""
        self.multiply.add_values(state, weights)


class CodedValues(Values):
    """Values as codes."""

    def __init__(self, source: CodedSource, w: Warp, plan: Plan) -> None:
        self.words, self.w, self.plan = source.words, w, plan

    def scales(self, registers: list[Register]) -> list[Register]:
        """See `Values`."""
        return codes.row_scales(self.w, registers[self.words :])

    def take(
        self, registers: list[Register], state: State, weights: list[Register], unit: Register, seen: Register
    ) -> None:
        """See `Values`."""
        codes.add_values(self.w, state.out, registers[: self.words], weights, self.plan)

    def add(self, state: State, weights: list[Register]) -> None:
        """See `Values`."""


def keys_of(
    source: Source,
    multiply: Products,
    mean: MeanKey | None,
    end: Register,
    w: Warp,
    at: Places,
    plan: Plan,
) -> Keys:
    """The keys of a KV head, of units before `end`; the block's warps share what they need of queries and mean."""
    coded = CodedQuery(w, at, plan)
    if mean:
        mean.share(end)
    if plan.key.bits:
        coded.share()
    w.sync_block()
    if not plan.key.bits:
        assert not isinstance(source, CodedSource)
        return TileKeys(source, multiply.read_query(), multiply, w, at, plan)
    return CodedKeys(source, coded, multiply, w, at, plan)


def values_of(source: Source, multiply: Products, w: Warp, at: Places, plan: Plan) -> Values:
    """The values of a KV head."""
    if isinstance(source, CodedSource):
        return CodedValues(source, w, plan)
    return TileValues(source, multiply, w, at, plan)
