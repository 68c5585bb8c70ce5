"""The results of a block's warps, which `Products.publish` left in shared memory, in one."""

import functools
import math
from typing import Any

from mustafar_jax.pallas_kernels.mosaic.plan import Plan
from mustafar_jax.pallas_kernels.mosaic.products import LOWEST
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp


def merge_warps(w: Warp, shared: Register, out: Any, m: Any, l: Any, plan: Plan) -> None:  # noqa: E741
    """Merge what the block's warps have published, and write it to global memory."""
    block, threads, size = w.block(), plan.warps * LANES, plan.group * plan.head_dim
    out, m, l = (w.row(x, block, 4 * n) for x, n in ((out, size), (m, plan.group), (l, plan.group)))  # noqa: E741
    for start in range(0, size, threads):
        element = w.warp() * LANES + w.lane() + start
        there = element < size
        element = w.select(there, element, w.integer(0))
        head = element // plan.head_dim
        sums, statistics = shared + (element << 2), shared + (head << 2)

        def read(address: Register, constant: int, warp: int) -> Register:
            return w.as_float(w.load_shared(address, 1, warp * plan.warp_bytes + constant)[0])

        warps = range(plan.warps)
        largest = [read(statistics, plan.tile_bytes, warp) for warp in warps]
        top = functools.reduce(w.maximum, largest)
        weights = [w.exp2(x - top) for x in largest]
        total, part = w.number(0), w.number(0)
        for warp, weight in enumerate(weights):
            total = total + weight * read(statistics, plan.tile_bytes + 64, warp)
            part = part + weight * read(sums, 0, warp)
        natural = w.select(top > LOWEST, top * math.log(2), w.number(LOWEST))
        w.store(out, element << 2, w.as_bits(part), where=there)
        first = w.select(there, element % plan.head_dim, w.integer(1)) == 0
        w.store(m, head << 2, w.as_bits(natural), where=first)
        w.store(l, head << 2, w.as_bits(total), where=first)
