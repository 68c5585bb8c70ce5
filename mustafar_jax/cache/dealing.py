"""Tokens that are dealt round to the devices of a mesh axis."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax import layout
from mustafar_jax.layout import Dealt
from mustafar_jax.operands import Tail
from mustafar_jax.rows import Rows
from mustafar_jax.sharding import CacheSharding


def dealt_by(sharding: CacheSharding | None, unit: int) -> Dealt:
    """How tokens are dealt, in groups of `unit`; `index` is there on a device's part alone."""
    if sharding is None or sharding.size("context") == 1:
        return Dealt(unit)
    assert sharding.context is not None
    return Dealt(unit, sharding.size("context"), lax.axis_index(sharding.context) if sharding.is_local else 0)


def undealt(x: jax.Array, axis: int, unit: int, count: int) -> jax.Array:
    """Rows of all devices, one device's after another's along an axis, in the order in which they were dealt.

    `unit` is how many indices of the axis a group of tokens has.
    """
    if count == 1:
        return x
    groups = x.shape[axis] // (unit * count)
    split = x.reshape(*x.shape[:axis], count, groups, unit, *x.shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(x.shape)


def own_tail(tail: Tail, lengths: jax.Array, packed: jax.Array, dealt: Dealt) -> tuple[Tail, jax.Array, jax.Array]:
    """The dense tokens of a device that has some of the packed rows: all of them on the first one, on others none.

    They become a ring without sinks that begins where the device's rows end. So what a device attends to is an ordinary
    cache, whose tokens stand closer together than they do; a score depends on that through the mean key alone, which
    knows better.

    Returns:
        The tokens; how many tokens and rows [B] the device has.
    """
    slots, rows = tail.key.shape[2], dealt.held(packed)
    number = (jnp.arange(slots)[None] - rows[:, None]) % slots  # of the token that a slot is to have
    position = jnp.where(number < tail.sinks, number, packed[:, None] + number)
    slot = layout.slot_of_position(position, tail.sinks, slots - tail.sinks)[:, None, :, None]
    key, value = (jnp.take_along_axis(x, slot, axis=2, mode="clip") for x in (tail.key, tail.value))
    count = jnp.where(dealt.index == 0, lengths - packed, 0)
    return Tail(key, value, 0), rows + count, rows


def norm_of_all(norm: jax.Array, sharding: CacheSharding | None) -> jax.Array:
    """The norm [B, K, H] of the queries of all devices that hold a KV head, of that of each one's own."""
    if sharding is None or sharding.repeats == 1 or not sharding.is_local:
        return norm
    assert sharding.kv_heads is not None
    device, count = lax.axis_index(sharding.kv_heads), sharding.size("kv_heads")
    mine = jnp.arange(count // sharding.repeats) == device // sharding.repeats
    # relative to the largest, so that squares neither over- nor underflow
    by_head = jnp.where(mine[:, None, None, None], norm[None], 0)
    largest = lax.pmax(by_head, sharding.kv_heads)
    squares = (by_head / jnp.where(largest > 0, largest, 1)) ** 2
    total = largest * jnp.sqrt(lax.psum(squares, sharding.kv_heads))
    return jnp.sum(jnp.where(mine[:, None, None, None], total, 0), axis=0)


def any_overflow(rows: Rows, sharding: CacheSharding | None) -> Rows:
    """Rows with the flags of all devices that hold tokens of theirs."""
    if rows.overflow is None or sharding is None or sharding.context is None or not sharding.is_local:
        return rows
    return dataclasses.replace(rows, overflow=_any(rows.overflow, sharding.context))


def any_head(flags: jax.Array, sharding: CacheSharding | None) -> jax.Array:
    """bool [B] of flags [B, K]: whether one is set, on any device."""
    flag = flags.any(axis=1)
    if sharding is None or sharding.kv_heads is None or not sharding.is_local:
        return flag
    return _any(flag, sharding.kv_heads)


def _any(flags: jax.Array, axis: str) -> jax.Array:
    return lax.psum(flags.astype(jnp.int32), axis) > 0


def merged(out: jax.Array, lse: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Attention to each device's tokens, [..., H], as that to all; by one collective.

    Args:
        out: what each device has attended to.
        lse: float32 [...], the log-sum-exp of its scores.
        axis: of the mesh.

    Returns:
        Both of all tokens, float32.
    """
    both = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    each = lax.all_gather(both, axis, to="invarying")
    outs, sums = each[..., :-1], each[..., -1]
    largest = sums.max(axis=0)
    largest = jnp.where(largest == -jnp.inf, 0, largest)  # no device has a token
    weights = jnp.exp(sums - largest[None])
    total = weights.sum(axis=0)
    whole = jnp.sum(outs * weights[..., None], axis=0) / jnp.where(total == 0, 1, total)[..., None]
    return whole, largest + jnp.log(total)
