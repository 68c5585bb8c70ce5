"""Writes into a batch of sequences, each at a place of its own, that compile to updates in place."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames="axis")
def write_rows(array: jax.Array, update: jax.Array, start: jax.Array, *, axis: int) -> jax.Array:
    """Overwrite `update.shape[axis]` consecutive rows along `axis`, from another start in each sequence.

    Args:
        array: [B, ...].
        update: of array's shape but for `axis`.
        start: int32 [B]; a sequence whose start is at the end of the axis or beyond is left as it is.
        axis: the axis of the rows, not the batch's.
    """
    # XLA for CPUs has no 16-bit scatter: it would convert the whole array to float32 and back. A slice update stays in
    # place there; on GPUs one scatter is one kernel, a loop of updates would be one kernel per sequence.
    by_slices, by_scatter = functools.partial(_by_slices, axis), functools.partial(_by_scatter, axis)
    return lax.platform_dependent(array, update, start, cpu=by_slices, default=by_scatter)


def _by_slices(axis: int, array: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    written = start < array.shape[axis]
    first_written = jnp.argsort(~written)  # only these are visited: to write back what was read would cost a copy

    def write_one(i: jax.Array, array: jax.Array) -> jax.Array:
        b = first_written[i].astype(jnp.int32)  # as the others are, also where integers are of 64 bits
        origin = [jnp.int32(0)] * array.ndim
        origin[0], origin[axis] = b, start[b].astype(jnp.int32)
        return lax.dynamic_update_slice(array, lax.dynamic_index_in_dim(update, b), origin)

    return lax.fori_loop(0, written.sum(), write_one, array)


def _by_scatter(axis: int, array: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    batch = jnp.arange(start.shape[0])[:, None]
    rows = start[:, None] + jnp.arange(update.shape[axis])[None]
    index = (batch, *[slice(None)] * (axis - 1), rows)
    moved = jnp.moveaxis(update, axis, 1)  # where a slice stands between them, indexed axes come first
    return array.at[index].set(moved, mode="drop", unique_indices=True)
