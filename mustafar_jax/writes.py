"""Writes into a batch of sequences, each at a place of its own, that compile to updates in place."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames="axis")
def write_rows(
    array: jax.Array,
    update: jax.Array,
    start: jax.Array,
    count: jax.Array | None = None,
    *,
    axis: int,
) -> jax.Array:
    """Overwrite consecutive rows along `axis`, from another start in each sequence.

    Args:
        array: [B, ...].
        update: of array's shape but for `axis`.
        start: int32 [B]; a sequence whose start is at the end of the axis or beyond is left as it is.
        count: int32 [B], how many of the update's rows there are, for which there must be room; others may be written,
            too, where there is. All if None.
        axis: the axis of the rows, not the batch's.
    """
    # XLA for CPUs has no 16-bit scatter: it would convert the whole array to float32 and back. A slice update stays in
    # place there; on GPUs one scatter is one kernel, a loop of updates would be one kernel per sequence.
    by_slices, by_scatter = functools.partial(_by_slices, axis), functools.partial(_by_scatter, axis)
    return lax.platform_dependent(array, update, start, count, cpu=by_slices, default=by_scatter)


def _by_slices(axis: int, array: jax.Array, update: jax.Array, start: jax.Array, count: jax.Array | None) -> jax.Array:
    written = start < array.shape[axis]
    if count is not None:
        written &= count > 0
        start, update = _moved_back(axis, array, update, start)
    first_written = jnp.argsort(~written)  # only these are visited: to write back what was read would cost a copy

    def write_one(i: jax.Array, array: jax.Array) -> jax.Array:
        b = first_written[i].astype(jnp.int32)  # as the others are, also where integers are of 64 bits
        origin = [jnp.int32(0)] * array.ndim
        origin[0], origin[axis] = b, start[b].astype(jnp.int32)
        return lax.dynamic_update_slice(array, lax.dynamic_index_in_dim(update, b), origin)

    return lax.fori_loop(0, written.sum(), write_one, array)


def _moved_back(axis: int, array: jax.Array, update: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same update from where it ends with the array at the latest, with what stands there before its first row.

    One slice a sequence: in 16-bit floating point XLA goes through the whole array at each slice update.
    """
    rows = min(update.shape[axis], array.shape[axis])
    first = jnp.minimum(start, array.shape[axis] - rows)
    offset = jnp.arange(rows)[None]
    over = offset - (start - first)[:, None]  # the row of the update

    def take(x: jax.Array, row: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, _along(axis, row, x.ndim), axis=axis, mode="clip")

    kept = take(array, first[:, None] + offset)
    return first, jnp.where(_along(axis, over, array.ndim) >= 0, take(update, over), kept)


def _along(axis: int, rows: jax.Array, ndim: int) -> jax.Array:
    """[B, n] as [B, 1, .., n, .., 1] that broadcasts against arrays whose rows stand along `axis`."""
    return rows.reshape(rows.shape[0], *(1,) * (axis - 1), rows.shape[1], *(1,) * (ndim - axis - 1))


def _by_scatter(axis: int, array: jax.Array, update: jax.Array, start: jax.Array, count: jax.Array | None) -> jax.Array:
    batch, offset = jnp.arange(start.shape[0])[:, None], jnp.arange(update.shape[axis])[None]
    rows, size = start[:, None] + offset, array.shape[axis]
    if count is not None:
        rows = jnp.where((offset < count[:, None]) & (rows < size), rows, size + offset)  # dropped
    index = (batch, *[slice(None)] * (axis - 1), rows)
    moved = jnp.moveaxis(update, axis, 1)  # where a slice stands between them, indexed axes come first
    return array.at[index].set(moved, mode="drop", unique_indices=True)
