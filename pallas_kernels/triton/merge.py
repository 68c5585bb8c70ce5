"""The end of flash decoding: the splits of the packed rows merged, the tokens that are not packed attended."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.backend import Attended
from mustafar_jax.layout import position_of_slot
from mustafar_jax.operands import Tail
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.rows import per_head
from mustafar_jax.rotation import SIGNS

_TILE = 64
"""Recent tokens, or splits, that a block takes at a time, at most."""

_State = tuple[jax.Array, jax.Array, jax.Array]  # m, l: []; out: [H]
_Parts = tuple[jax.Array, jax.Array, jax.Array]  # m, l: [n]; out: [n, H]; unnormalised, to be merged


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
    """Merge splits with attention over the dense slots, and normalise. A block takes one query head.

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
    heads = batch * kv_heads
    of_sequence = pl.BlockSpec((None, 1), lambda g, head: (head // kv_heads, 0))
    of_query = pl.BlockSpec((None, None, head_dim), lambda g, head: (head, g, 0))
    slots = [x.reshape(heads, -1, head_dim) for x in (tail.key, tail.value)]
    operands = [lengths[:, None], packed_lengths[:, None], query.reshape(heads, group, head_dim), *slots, *splits]
    specs = [of_sequence, of_sequence, of_query, *map(per_head, slots)]
    if splits:
        count = splits[0].shape[1]
        specs.append(pl.BlockSpec((None, count, None, head_dim), lambda g, head: (head, 0, g, 0)))
        specs += [pl.BlockSpec((None, count, None), lambda g, head: (head, 0, g))] * 2
    result = jax.ShapeDtypeStruct((heads, group, head_dim), query.dtype)
    outs = tl.pallas_call(
        functools.partial(_kernel, splits=len(splits), sinks=tail.sinks, scale=scale, window=window, turned=turned),
        name="merge",
        num_warps=4,
        interpret=interpret,
        grid=(group, heads),
        in_specs=specs,
        out_specs=[of_query, *[pl.BlockSpec((None, None, 1), lambda g, head: (head, g, 0))] * return_lse],
        out_shape=[result, *[jax.ShapeDtypeStruct((heads, group, 1), jnp.float32)] * return_lse],
    )(*operands)
    out = outs[0].reshape(query.shape)
    return (out, outs[1].reshape(query.shape[:3])) if return_lse else out


def _kernel(
    length_ref: tl.Ref,  # [1]
    packed_ref: tl.Ref,  # [1]
    q_ref: tl.Ref,  # [H]
    key_ref: tl.Ref,  # [slots, H]
    value_ref: tl.Ref,  # [slots, H]
    *refs: tl.Ref,  # out [splits, H], m [splits] and l [splits], if any; the results [H] and, if wanted, [1]
    splits: int,
    sinks: int,
    scale: float,
    window: int | None,
    turned: bool,
) -> None:
    """One query head."""
    split_refs, (result_ref, *lse_refs) = refs[:splits], refs[splits:]
    slots, head_dim = key_ref.shape
    length, packed = length_ref[0], packed_ref[0]
    channel = jnp.arange(head_dim)[None, :]
    query = q_ref[...].astype(jnp.float32) * scale

    def slots_from(first: Any, size: int, end: int) -> Callable[[], _Parts]:
        """Begin to load slots first .. first + size - 1, of those before `end`."""
        slot = first + jnp.arange(size)
        position = position_of_slot(slot, packed, sinks, slots - sinks)
        visible = (slot < end) & (position < length)
        if window is not None:
            visible &= position >= length - window
        mask = jnp.broadcast_to(visible[:, None], (size, head_dim))
        key, value = (tl.load(ref.at[slot[:, None], channel], mask=mask, other=0) for ref in (key_ref, value_ref))

        def parts() -> _Parts:
            scores = jnp.where(visible, jnp.sum(key.astype(jnp.float32) * query[None, :], axis=1), -jnp.inf)
            return scores, jnp.ones_like(scores), value.astype(jnp.float32)

        return parts

    def splits_from(first: Any, size: int, end: int) -> Callable[[], _Parts]:
        """Begin to load splits first .. first + size - 1, of those before `end`."""
        out_ref, m_ref, l_ref = split_refs
        split = first + jnp.arange(size)
        there = split < end
        m = tl.load(m_ref.at[split], mask=there, other=-jnp.inf)
        l = tl.load(l_ref.at[split], mask=there, other=0)  # noqa: E741
        mask = jnp.broadcast_to(there[:, None], (size, head_dim))
        out = tl.load(out_ref.at[split[:, None], channel], mask=mask, other=0)
        return lambda: (m, l, out)

    zero = jnp.zeros((), jnp.float32)
    state = (jnp.full((), np.finfo(np.float32).min), zero, jnp.zeros(head_dim, jnp.float32))
    sources = [(slots_from, range(sinks, slots)), (slots_from, range(sinks))]
    if split_refs and turned:
        largest, total, out = _over_all([(splits_from, range(split_refs[1].shape[0]))], state)
        state = largest, total, _turn_back(out)
    elif split_refs:
        sources.append((splits_from, range(split_refs[1].shape[0])))
    largest, total, out = _over_all([(load, what) for load, what in sources if what], state)
    result_ref[...] = (out / jnp.where(total > 0, total, 1)).astype(result_ref.dtype)
    for lse_ref in lse_refs:  # what is not a number stays so
        lse = jnp.where(total == 0, -jnp.inf, largest + jnp.log(jnp.where(total == 0, 1, total)))
        lse_ref[...] = jnp.broadcast_to(lse, (1,))


def _over_all(sources: list[tuple[Callable[[Any, int, int], Callable[[], _Parts]], range]], state: _State) -> _State:
    """The state and what all sources load: of each one tile, all on their way before the first is used; then the rest.

    There is no rest up to 64 recent tokens, sinks or splits each, which is what configurations and launches come to.
    """
    # Triton's sizes are powers of two
    sizes = [min(_TILE, max(16, 1 << (len(what) - 1).bit_length())) for _, what in sources]
    begun = [load(what.start, size, what.stop) for (load, what), size in zip(sources, sizes, strict=True)]
    for parts in begun:
        state = _add(state, *parts())
    for (load, what), size in zip(sources, sizes, strict=True):
        tiles = -(-len(what) // size)

        def step(i: Any, state: _State, load: Any = load, what: range = what, size: int = size) -> _State:
            return _add(state, *load(what.start + i * size, size, what.stop)())

        if tiles > 1:
            state = lax.fori_loop(1, tiles, step, state)
    return state


def _add(state: _State, m: jax.Array, l: jax.Array, out: jax.Array) -> _State:  # noqa: E741
    """Merge parts into a state: m and l [n], out [n, H], unnormalised."""
    largest, total, sums = state
    new = jnp.maximum(largest, jnp.max(m))
    decay, weights = jnp.exp(largest - new), jnp.exp(m - new)
    return new, total * decay + jnp.sum(weights * l), sums * decay + jnp.sum(weights[:, None] * out, axis=0)


def _turn_back(x: jax.Array) -> jax.Array:
    """`rotation.turn_back` of [H]: for each bit of a channel's number sums and differences, then the signs."""
    head_dim, distance = x.shape[0], 1
    while distance < head_dim:
        pairs = x.reshape(-1, 2, distance).transpose(0, 2, 1)
        first, second = tl.split(pairs)
        x = jnp.stack([first + second, first - second], axis=-1).transpose(0, 2, 1).reshape(head_dim)
        distance *= 2
    is_minus = jnp.arange(head_dim, dtype=jnp.int32) * np.uint32(SIGNS).view(np.int32) < 0
    x = x * np.float32(head_dim**-0.5)
    return jnp.where(is_minus, -x, x)
