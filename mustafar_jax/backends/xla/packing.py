"""Pruning and packing in plain JAX, by the functions of `pruning` and `rows`."""

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
    held, ranked = _held_and_ranked(side, x, positions)
    if side.format.slots is None:
        return side.format.pack(turn(held) if side.turn else held)
    mask = side.method.mask(ranked, side.sparsity, context)
    held = rescale_to_norm(held, mask) if side.rescale else held
    weight = None if side.weight is None else side.weight[:, :, None]
    return side.format.pack(held, mask & context.valid[:, None, :, None], weight)


def _held_and_ranked(side: Side, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [B, K, n, H] at positions [B, n] less the mean, and what their entries are chosen by.

    The first are float32 where there is a mean, to be rounded once, when they are packed; the second of x's dtype.
    """
    if side.mean is None and side.weight is None:
        return x, x
    exact = x.astype(jnp.float32)
    if side.mean is not None:
        exact -= side.mean.at(positions)
    ranked = exact if side.weight is None else exact * side.weight[:, :, None]
    return (x if side.mean is None else exact), ranked.astype(x.dtype)
