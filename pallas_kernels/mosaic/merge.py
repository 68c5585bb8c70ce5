"""The end of flash decoding: the splits of the packed rows merged, the tokens that are not packed attended.

A block takes some query heads of a KV head. Each of its warps begins to load 16 dense slots and its share of the
splits before it uses any; what the warps find, parts, meets in shared memory. Dense slots are multiplied by matrix
products, so that several query heads cost as much as one. Lane 4 g + t holds of a product what `Warp.multiply_add`
says; g and t below are these two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.backend import Attended
from mustafar_jax.operands import Tail
from mustafar_jax.pallas_kernels.mosaic import hadamard, lowering
from mustafar_jax.pallas_kernels.mosaic.merge_parts import Part, Slots, Splits, combined
from mustafar_jax.pallas_kernels.mosaic.merge_plan import Plan, queries_per_block
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Register, Warp


def merge(
    query: jax.Array,
    splits: list[jax.Array],
    tail: Tail,
    lengths: jax.Array,
    packed_lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    turned: bool = False,
    return_lse: bool = False,
    interpret: bool = False,
) -> Attended:
    """Merge splits with attention over the dense slots, and normalise.

    Args:
        query: [B, K, G, H].
        splits: float32 out [B * K, splits, G, H], m and l [B * K, splits, G], as `attend_rows` returns them; or none.
        tail: the dense slots.
        lengths, packed_lengths, scale, window, interpret: as in `decode_attention`.
        turned: whether the splits are of values as `rotation.turn` gives them; the dense slots are not.
        return_lse: whether to give the log-sum-exp of the scores, too.

    Returns:
        As `decode_attention`.
    """
    batch, kv_heads, group, head_dim = query.shape
    slots, count = tail.key.shape[2], splits[0].shape[1] if splits else 0
    plan = Plan(
        head_dim=head_dim,
        group=group,
        kv_heads=kv_heads,
        queries=queries_per_block(heads=batch * kv_heads, group=group, slots=slots, splits=count),
        slots=slots,
        sinks=tail.sinks,
        splits=count,
        scale=scale * math.log2(math.e),
        window=window,
        turned=turned,
        return_lse=return_lse,
    )
    whole = [x.astype(jnp.int32) for x in (lengths, packed_lengths)]
    shapes = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    shapes += [jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)] * return_lse
    found = lowering.kernel_call(
        functools.partial(merge_block, plan=plan),
        *(x.reshape(-1) for x in (*whole, query, tail.key, tail.value, *splits)),
        out_shape=shapes,
        blocks=batch * kv_heads * plan.shares,
        warps=plan.warps,
        shared_bytes=plan.shared_bytes,
        dtype=query.dtype,
        interpret=interpret,
    )
    return (found[0], found[1]) if return_lse else found[0]


def merge_block(w: Warp, shared: Register, *refs: Any, plan: Plan) -> None:
    """Some query heads of one KV head.

    refs: lengths and packed lengths int32 [B], query [B, K, G, H], key and value [B, K, slots, H]; if there are splits
    out [heads, splits, G, H], m and l [heads, splits, G]; the results [B, K, G, H] and, if wanted, [B, K, G].
    """
    lengths, packed_lengths, query, key, value, *rest = refs
    splits, (result, *lse) = rest[: 3 * (plan.splits > 0)], rest[3 * (plan.splits > 0) :]
    block = w.block()
    head, share = block // plan.shares, block % plan.shares
    length, packed = (w.load(x, (head // plan.kv_heads) << 2, 1, early=True)[0] for x in (lengths, packed_lengths))
    # splits begin with the last warp, which has no slots where there are few
    turned = w.integer(plan.warps - 1) - w.warp()
    rows = Splits(w, splits, head, share, plan) if splits else None
    begun = rows.load(turned) if rows else []
    query, result = (w.row(x, block, plan.queries * plan.head_dim * 2) for x in (query, result))
    lse = [w.row(x, block, plan.queries * 4) for x in lse]
    key, value = (w.row(x, head, plan.slots * plan.head_dim * 2) for x in (key, value))
    slots = Slots(w, query, key, value, length, packed, plan)

    def attend(_: list[Register]) -> list[Register]:
        slots.publish(slots.attend(), shared + w.warp() * plan.part_bytes)
        return []

    def add(_: list[Register]) -> list[Register]:
        assert rows
        rows.publish(rows.merge(turned, begun), shared + (turned + plan.of_slots) * plan.part_bytes)
        return []

    def finish(_: list[Register]) -> list[Register]:
        merge_parts(w, shared, result, lse, plan)
        return []

    w.branch(w.warp() < plan.of_slots, [], attend)
    if rows:
        w.branch(turned < plan.splits, [], add)
    w.sync_block()
    w.branch(w.warp() * LANES < plan.queries * plan.head_dim // 4, [], finish)


def merge_parts(w: Warp, shared: Register, result: Any, lse: list[Any], plan: Plan) -> None:
    """Merge what the block's warps have published, normalise it and write it; a lane has 4 channels of a query head."""
    item = w.warp() * LANES + w.lane()
    there = item < plan.queries * plan.head_dim // 4
    item = w.select(there, item, w.integer(0))
    row = shared + item // (plan.head_dim // 4) * plan.row_bytes
    places = [n * plan.part_bytes for n in range(plan.parts)]
    statistics = [w.load_shared(row, 2, place + plan.head_dim * 4) for place in places]
    channels = row + (item % (plan.head_dim // 4) << 4)
    rows = [w.load_shared(channels, 4, place) for place in places]
    parts = [
        Part(w.as_float(m), w.as_float(l), [w.as_float(x) for x in out])
        for (m, l), out in zip(statistics, rows, strict=True)  # noqa: E741
    ]
    if plan.turned and plan.splits:
        m, l, out = combined(w, parts[plan.of_slots :])  # noqa: E741
        parts[plan.of_slots :] = [Part(m, l, hadamard.turn_back(w, out, plan.head_dim // 4))]
    largest, total, out = combined(w, parts)
    factor = w.reciprocal(w.select(total > 0, total, w.number(1)))
    for n in range(0, 4, 2):
        w.store(result, (item << 3) + 2 * n, w.pack_pair(*(x * factor for x in out[n : n + 2])), where=there)
    for of_heads in lse:  # m and l are to base 2
        found = (largest + w.log2(total)) * math.log(2)
        found = w.select(total == 0.0, w.number(-math.inf), found)  # what is not a number stays so
        first = there & (item % (plan.head_dim // 4) == 0)
        w.store(of_heads, item // (plan.head_dim // 4) << 2, w.as_bits(found), where=first)
