"""The published pruning rule and cache format, for comparisons with the published code (arXiv 2505.22913).

The library itself prunes with `magnitude_mask` and packs with `pack`. What is here reproduces, bit for bit, which
entries the published code keeps and the arrays that it hands to its kernels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mustafar_jax import pruning

HEAD_DIM = 128
"""The only head_dim that the published kernels take."""

TILE = 64
"""Elements of a tile: one bit each in a 64-bit bitmap."""

VALUES_MULTIPLE = 8
"""A tile's values are padded with zeros to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class PublishedCache:
    """Keys or values of one sequence in the published format: tiles of 64 elements, each a bitmap and its nonzeros.

    Attributes:
        bitmaps: int64 [heads, tiles], tiles = S * 128 / 64. A tile's first element is the most significant bit.
        offsets: int32 [heads, tiles + 1]: where each tile's values begin, counted in 4-byte units (two float16) from
            the beginning of its head's values; the last entry is where the head's values end.
        values: float16 [total]: the nonzeros of all tiles of all heads in order, each tile's padded with zeros to a
            multiple of 8.
    """

    bitmaps: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int32]
    values: npt.NDArray[np.float16]


def published_mask(x: jax.Array, sparsity: float) -> jax.Array:
    """Keep what the published code keeps of each vector: every magnitude not below the k-th smallest.

    k is int(sparsity * D), so the k-th smallest itself is kept too, and so is whatever equals it: D = 128 keeps 65 at
    0.5 and 40 at 0.7, more where magnitudes are equal. (`magnitude_mask` keeps exactly `keep_count`.) The published
    code then multiplies by the mask, so a negative entry that is removed becomes -0.0.

    Args:
        x: [..., D], bfloat16, float16 or float32.
        sparsity: the fraction removed, in [0, 1); static under `jax.jit`.

    Returns:
        bool [..., D], True where kept. NaN is never kept, and where the k-th smallest is NaN (NaN counts as the largest
        magnitude) nothing is: no comparison with NaN holds.

    Raises:
        ValueError: x without an axis, sparsity outside [0, 1).
        TypeError: another dtype.
    """
    if x.ndim < 1:
        raise ValueError(f"x has shape {x.shape}; wanted [..., D]")
    pruning.check_sparsity("sparsity", sparsity)
    size = x.shape[-1]
    bits = pruning.magnitude_bits(x)
    threshold = pruning.kth_largest(bits, size - int(sparsity * size) + 1)
    return (bits >= threshold) & ~jnp.isnan(x)


def export_keys(x: npt.ArrayLike) -> PublishedCache:
    """Write pruned keys in the published format: a tile is 64 tokens of one channel.

    The tiles' order is: for each block of 64 tokens, the channels 0 to 127.

    Args:
        x: float16 [heads, S, 128] with S a multiple of 64, zero where pruned; a numpy or a concrete JAX array. What is
            stored is what compares unequal to zero: NaN is stored with its bits, and -0.0 is not stored (it comes back
            as 0.0), as in the published code.

    Returns:
        The published arrays.

    Raises:
        ValueError: another rank or head_dim, S not a multiple of 64.
        TypeError: another dtype.
    """
    x = _checked(x)
    heads, length, head_dim = x.shape
    blocks = x.reshape(heads, length // TILE, TILE, head_dim)
    return _export(blocks.swapaxes(2, 3).reshape(heads, length * head_dim // TILE, TILE))


def export_values(x: npt.ArrayLike) -> PublishedCache:
    """Write pruned values in the published format: a tile is 64 channels of one token.

    The tiles' order is: for each block of 64 tokens, for each half of the channels, the tokens 0 to 63.
    Arguments, what is stored, result and errors are those of `export_keys`.
    """
    x = _checked(x)
    heads, length, head_dim = x.shape
    blocks = x.reshape(heads, length // TILE, TILE, head_dim // TILE, TILE)
    return _export(blocks.swapaxes(2, 3).reshape(heads, length * head_dim // TILE, TILE))


def _checked(x: npt.ArrayLike) -> npt.NDArray[np.float16]:
    """x as a numpy array that the published format can hold."""
    array = np.asarray(x)
    if array.ndim != 3:
        raise ValueError(f"x has shape {array.shape}; wanted [heads, S, {HEAD_DIM}]")
    if array.dtype != np.float16:
        raise TypeError(f"x has dtype {array.dtype}; wanted float16, the published format's only dtype")
    _, length, head_dim = array.shape
    if head_dim != HEAD_DIM:
        raise ValueError(f"x has head_dim {head_dim}; wanted {HEAD_DIM}, the published format's only head_dim")
    if length % TILE:
        raise ValueError(f"x has S={length} tokens; wanted a multiple of {TILE}")
    return array


def _export(tiles: npt.NDArray[np.float16]) -> PublishedCache:
    """Pack [heads, tiles, 64], already in the published order of tiles."""
    held = tiles != 0
    counts = held.sum(axis=-1)
    padding = -counts % VALUES_MULTIPLE
    sizes = counts + padding
    offsets = np.zeros((tiles.shape[0], tiles.shape[1] + 1), np.int32)
    np.cumsum(sizes // 2, axis=-1, out=offsets[:, 1:])
    # The n-th nonzero of all stands behind n others and the padding of the tiles before its own.
    padding_before = np.cumsum(padding) - padding.reshape(-1)
    places = np.arange(counts.sum()) + np.repeat(padding_before, counts.reshape(-1))
    values = np.zeros(sizes.sum(), np.float16)
    values[places] = tiles[held]
    return PublishedCache(_bitmaps(held), offsets, values)


def _bitmaps(held: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Bool [heads, tiles, 64] -> int64 [heads, tiles], the first element in the most significant bit."""
    in_bytes = np.ascontiguousarray(np.packbits(held, axis=-1))
    return in_bytes.view(">i8")[..., 0].astype(np.int64)
