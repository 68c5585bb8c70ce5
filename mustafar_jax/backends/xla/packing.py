"""Pruning and packing in plain JAX, by the functions of `pruning` and `rows`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.operands import Packing, Side
from mustafar_jax.pruning import Context, rescale_to_norm
from mustafar_jax.rotation import turn
from mustafar_jax.rows import Rows
from mustafar_jax.sharding import varying_as


def pack(packing: Packing) -> tuple[Rows, Rows]:
    """Prune and pack, where any sequence has something to pack."""
    targets = packing.key.target, packing.value.target
    targets = varying_as(targets, targets, packing.key.source, packing.start)

    def compress() -> tuple[Rows, Rows]:
        offset = jnp.arange(packing.rows)[None]
        positions = packing.offset + packing.start[:, None] + offset
        valid = offset < packing.held[:, None]
        context = packing.context(positions, valid)
        key, value = (_compress(side, packing.taken(side.source), positions, context) for side in packing.sides)
        start, count = packing.start, packing.count
        return targets[0].put(key, start, count), targets[1].put(value, start, count)

    return lax.cond((packing.start < targets[0].length).any(), compress, lambda: targets)


def _compress(side: Side, x: jax.Array, positions: jax.Array, context: Context) -> Rows:
    """Prune and pack x [B, K, n, H] at positions [B, n]; where entries are chosen, invalid rows hold nothing."""
    held = _held(side, x, positions)
    if side.format.slots is None:
        return side.format.pack(turn(held) if side.turn else held)
    ranked = _once(functools.partial(_ranked, side, x, positions), x, positions)
    mask = side.method.mask(ranked, side.sparsity, context)
    held = rescale_to_norm(held, mask) if side.rescale else held
    weight = None if side.weight is None else side.weight[:, :, None]
    return side.format.pack(held, mask & context.valid[:, None, :, None], weight)


def _held(side: Side, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Vectors [B, K, n, H] at positions [B, n] less the mean: float32 then, to be rounded once, by packing."""
    return x if side.mean is None else x.astype(jnp.float32) - side.mean.at(positions)


def _ranked(side: Side, x: jax.Array, positions: jax.Array) -> jax.Array:
    """What their entries are chosen by, of x's dtype."""
    held = _held(side, x, positions)
    return (held if side.weight is None else held.astype(jnp.float32) * side.weight[:, :, None]).astype(x.dtype)


def _once(compute: Callable[[], jax.Array], x: jax.Array, positions: jax.Array) -> jax.Array:
    """What is computed, like x, in one place alone.

    XLA for CPUs computes again what several others read, not always rounded alike: the k-th largest would then miss
    itself. It cannot do so with what a loop gives whose length it does not know. A barrier to optimisation would be
    gone before that.
    """

    def typed() -> jax.Array:
        return varying_as(compute(), x, positions)

    def in_loop() -> jax.Array:
        first = (positions[0, 0] & 1) >> 1  # 0
        return lax.fori_loop(first, 1, lambda _, _before: typed(), varying_as(jnp.zeros_like(x), positions))

    return lax.platform_dependent(cpu=in_loop, default=typed)
