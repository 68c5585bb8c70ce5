"""Split-K flash decoding over keys and values in codes without a bitmap: a tile of 128 tokens at a time (`codes`)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import codes, launch
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.codes import Codes
from mustafar_jax.pallas_kernels.triton.mean import Centre
from mustafar_jax.pallas_kernels.triton.rows import attend_by_split, per_head
from mustafar_jax.pallas_kernels.triton.tile import COLUMNS, ROWS, TOKENS, Rotations, TileReader
from mustafar_jax.rotation import turn
from mustafar_jax.rows import Rows

LOWEST = float(np.finfo(np.float32).min)


def attend_codes(
    query: jax.Array,
    key: Rows,
    value: Rows,
    first: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    mean: Mean | None,
    turned_keys: bool,
    params: launch.DecodeParams,
    interpret: bool,
) -> list[jax.Array]:
    """`decode_attention.attend_rows` of rows that are coded on both sides."""
    batch, kv_heads, group, head_dim = query.shape
    heads, rows = batch * kv_heads, key.padded_length
    tiles_per_split = -(-rows // (TOKENS * params.splits))
    centre = None
    if mean is not None:
        reader, rotations = TileReader(head_dim, codes.DTYPE, interpret), Rotations.of(group, codes.ORDER)
        centre = Centre(reader, rotations, group, tiles_per_split)
    plan = _Plan(
        key=Codes.of(key),
        value=Codes.of(value),
        group=group,
        tiles_per_split=tiles_per_split,
        scale=scale * math.log2(math.e),
        centre=centre,
    )
    # queries are turned in place of keys, for the codes alone
    asked = (turn(query) if turned_keys else query).reshape(heads, group, head_dim)
    operands = [first[:, None], last[:, None], asked]
    of_sequence = pl.BlockSpec((None, 1), lambda split, head: (head // kv_heads, 0))
    specs = [of_sequence, of_sequence, per_head(asked)]
    for side in (key, value):
        assert side.scale is not None
        words = lax.bitcast_convert_type(side.payload, jnp.int32)
        scales = lax.bitcast_convert_type(side.scale.reshape(heads, -1, 2), jnp.int32)
        operands += [words.reshape(heads, -1), scales]
    specs += map(per_head, operands[3:])
    if centre is not None:
        assert mean is not None
        tables = [jnp.asarray(x) for x in centre.tables(mean, params.splits)]
        operands += [query.reshape(asked.shape), mean.key.astype(jnp.float32).reshape(heads, head_dim), *tables]
        specs += [*map(per_head, operands[-4:-2]), *(pl.BlockSpec(x.shape, lambda split, head: (0,)) for x in tables)]
    kernel = functools.partial(_kernel, plan=plan)
    return attend_by_split(
        kernel, operands, specs, name="attend_codes", splits=params.splits, queries=operands[2], interpret=interpret
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for; `scale` is that of scores to base 2."""

    key: Codes
    value: Codes
    group: int
    tiles_per_split: int
    scale: float
    centre: Centre | None

    @property
    def rows(self) -> int:
        """Of a product, those that can be query heads."""
        return 8 if self.group <= 8 else ROWS


def _kernel(
    first_ref: tl.Ref,  # [1]
    last_ref: tl.Ref,  # [1]
    q_ref: tl.Ref,  # [G, H]
    key_ref: tl.Ref,  # [S / 32 * H * bits]
    key_scale_ref: tl.Ref,  # [S / 2]
    value_ref: tl.Ref,
    value_scale_ref: tl.Ref,
    *refs: tl.Ref,
    plan: _Plan,
) -> None:
    """One split of one KV head.

    The other refs: where keys are centred the queries as they are [G, H], mean [H] and `Centre.tables`; outputs out
    [G, H], m [G], l [G].
    """
    mean_refs, (out_ref, m_ref, l_ref) = list(refs[:-3]), refs[-3:]
    first, last = first_ref[0], jnp.minimum(last_ref[0], plan.key.rows)
    start = pl.program_id(0) * plan.tiles_per_split
    begin = jnp.maximum(start, first // TOKENS)
    end = jnp.minimum(start + plan.tiles_per_split, -(-last // TOKENS))
    query = _Query.of(q_ref, mean_refs, plan)
    column = jnp.arange(COLUMNS, dtype=jnp.int32)
    halves = (0, 1, 0, 1)  # of a tile of codes, by product
    ones = 1 / codes.spread(plan.value, codes.place_of(jnp.arange(TOKENS, dtype=jnp.int32)))
    ones = jnp.broadcast_to(ones[:, None], (TOKENS, COLUMNS)).astype(codes.DTYPE)

    def attend(i: jax.Array, carry: tuple) -> tuple:  # type: ignore[type-arg]
        m, total, middle, out = carry
        key_words = codes.load_keys(key_ref, i, plan.key)
        value_words = codes.load_values(value_ref, i, plan.value)
        tokens = [i * TOKENS + first_token + codes.ORDER.token(column) for first_token in codes.ORDER.products]
        seen = [(x >= first) & (x < last) for x in tokens]
        key_scales = codes.load_scales(key_scale_ref, i, plan.key)
        value_scales = codes.load_scales(value_scale_ref, i, plan.value)
        value_scales = [jnp.where(x, y, 0) for x, y in zip(seen, value_scales, strict=True)]
        scores = [
            (codes.heads(product, plan.rows) * query.factors[half] + query.offset) * scales[None, :]
            for product, half, scales in zip(
                codes.times_keys(query.of_codes, key_words, plan.key), halves, key_scales, strict=True
            )
        ]
        if plan.centre is not None:
            of_mean = codes.times_table(query.of_mean, mean_refs[3], i - start, plan.centre.rotations, query.mean_unit)
            scores = [x + codes.heads(y, plan.rows) for x, y in zip(scores, of_mean, strict=True)]
        scores = [jnp.where(x[None, :], y, -jnp.inf) for x, y in zip(seen, scores, strict=True)]
        # weights times scales stay within float16, since the maximum is of both
        raised = [x + codes.scale_logs(scales)[None, :] for x, scales in zip(scores, value_scales, strict=True)]
        m_new = jnp.maximum(m, functools.reduce(jnp.maximum, raised).max(axis=1))
        decay = jnp.exp2(m - m_new)[:, None]
        weights = [jnp.exp2(x - m_new[:, None]) for x in scores]
        total = total * decay + functools.reduce(jnp.add, weights)
        factors = [
            scales * np.float32((1, plan.value.inner)[half]) for scales, half in zip(value_scales, halves, strict=True)
        ]
        scaled = codes.join([(x * y[None, :]).astype(codes.DTYPE) for x, y in zip(weights, factors, strict=True)])
        middle = middle * decay + codes.heads(tl.dot(scaled, ones), plan.rows)
        products = [codes.heads(x, plan.rows) for x in codes.times_values(scaled, value_words, plan.value)]
        return m_new, total, middle, [x * decay + y for x, y in zip(out, products, strict=True)]

    zeros = jnp.zeros((plan.rows, COLUMNS), jnp.float32)
    carry = (jnp.full(plan.rows, LOWEST, jnp.float32), zeros, zeros, [zeros] * plan.value.products)
    m, total, middle, out = lax.fori_loop(begin, end, attend, carry)
    head = jnp.arange(plan.rows)
    there = head < plan.group
    for product, part in enumerate(out):
        channel = codes.channels(product, column, plan.value)
        levels = part - middle * np.float32(plan.value.middle)
        tl.store(out_ref.at[head[:, None], channel[None, :]], levels, mask=there[:, None])
    tl.store(m_ref.at[head], jnp.maximum(m * math.log(2), LOWEST), mask=there)
    tl.store(l_ref.at[head], total.sum(axis=1), mask=there)


@dataclasses.dataclass(frozen=True)
class _Query:
    """A block's queries, as products take them.

    Attributes:
        of_codes: what multiplies codes, [ROWS, H] of `codes.DTYPE`.
        factors: float32 [rows, 1] for either half of a tile: a product with codes times it, plus
        offset: float32 [rows, 1], is a score to base 2 but for its row's scale.
        of_mean: what multiplies the mean's table, or anything; the same array where its rows suffice, since a tile
            reads each array from shared memory.
        mean_unit: float32 [ROWS], what its rows count for.
    """

    of_codes: jax.Array
    factors: list[jax.Array]
    offset: jax.Array
    of_mean: jax.Array
    mean_unit: jax.Array

    @classmethod
    def of(cls, q_ref: tl.Ref, mean_refs: list[tl.Ref], plan: _Plan) -> "_Query":
        """Those in `q_ref`, turned where keys are; those of the mean's refs are not."""
        head, channel = jnp.arange(ROWS)[:, None], codes.place_of(jnp.arange(plan.key.head_dim))[None, :]
        mask = jnp.broadcast_to(head < plan.group, (ROWS, plan.key.head_dim))
        query, unit = codes.into_range(tl.load(q_ref.at[head, channel], mask=mask, other=0).astype(jnp.float32))
        unit = unit * np.float32(plan.scale)
        total = query.astype(codes.DTYPE).astype(jnp.float32).sum(axis=1)
        offset = codes.heads((total * (unit * np.float32(-plan.key.middle)))[:, None], plan.rows)
        factors = [codes.heads((unit * np.float32(x))[:, None], plan.rows) for x in plan.key.units]
        operand = (query * codes.spread(plan.key, channel)).astype(codes.DTYPE)
        if plan.centre is None:
            return cls(operand, factors, offset, operand, unit)
        asked_ref, mean_ref, turns_ref, _ = mean_refs
        of_mean, unit = codes.into_range(plan.centre.query(asked_ref, mean_ref, turns_ref, codes.place_of))
        of_mean, unit = of_mean.astype(codes.DTYPE), unit * np.float32(plan.scale)
        if plan.centre.rotations.rows < ROWS:
            is_mean = head >= ROWS - plan.centre.rotations.rows
            operand = of_mean = jnp.where(is_mean, of_mean, operand)
        return cls(operand, factors, offset, of_mean, unit)
