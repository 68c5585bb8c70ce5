"""Writes into a batch of sequences, each at a place of its own, that compile to updates in place."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames=("axis", "block"))
def write_rows(
    array: jax.Array,
    update: jax.Array,
    start: jax.Array,
    count: jax.Array | None = None,
    *,
    axis: int,
    block: int = 1,
) -> jax.Array:
    """Overwrite consecutive rows along `axis`, from another start in each sequence.

    Args:
        array: [B, ...].
        update: of array's shape but for `axis`.
        start: int32 [B]; a sequence whose start is at the end of the axis or beyond is left as it is.
        count: int32 [B], multiples of `block`: how many of the update's rows are written; all if None. They must fit.
        axis: the axis of the rows, not the batch's.
        block: rows of each sequence that may be written at once, a divisor of the update's; it matters for speed alone.
    """
    # XLA for CPUs has no 16-bit scatter: it would convert the whole array to float32 and back. A slice update stays in
    # place there; on GPUs one scatter is one kernel, a loop of updates would be one kernel per sequence.
    by_slices, by_scatter = functools.partial(_by_slices, axis, block), functools.partial(_by_scatter, axis)
    return lax.platform_dependent(array, update, start, count, cpu=by_slices, default=by_scatter)


def _by_slices(
    axis: int, block: int, array: jax.Array, update: jax.Array, start: jax.Array, count: jax.Array | None
) -> jax.Array:
    block = update.shape[axis] if count is None else block
    blocks = 1 if count is None else count // block
    # Only blocks that are written are visited: to write back what was read would cost a copy.
    last = jnp.cumsum(jnp.where(start < array.shape[axis], blocks, 0))

    def write_one(i: jax.Array, array: jax.Array) -> jax.Array:
        b = jnp.sum(i >= last, dtype=jnp.int32)  # of 32 bits as the others are, also where integers are of 64
        row = (i - jnp.where(b > 0, last[b - 1], 0)) * block
        taken, place = ([jnp.int32(0)] * array.ndim for _ in range(2))
        taken[0] = place[0] = b
        taken[axis], place[axis] = row.astype(jnp.int32), (start[b] + row).astype(jnp.int32)
        sizes = [1, *update.shape[1:]]
        sizes[axis] = block
        return lax.dynamic_update_slice(array, lax.dynamic_slice(update, taken, sizes), place)

    return lax.fori_loop(0, last[-1], write_one, array)


def _by_scatter(axis: int, array: jax.Array, update: jax.Array, start: jax.Array, count: jax.Array | None) -> jax.Array:
    batch, offset = jnp.arange(start.shape[0])[:, None], jnp.arange(update.shape[axis])[None]
    rows, size = start[:, None] + offset, array.shape[axis]
    if count is not None:
        rows = jnp.where((offset < count[:, None]) & (rows < size), rows, size + offset)  # dropped
    index = (batch, *[slice(None)] * (axis - 1), rows)
    moved = jnp.moveaxis(update, axis, 1)  # where a slice stands between them, indexed axes come first
    return array.at[index].set(moved, mode="drop", unique_indices=True)
