"""Which entries of a cached vector are kept (arXiv 2505.22913, section 3)."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_BITS_OF = {jnp.dtype(jnp.bfloat16): jnp.uint16, jnp.dtype(jnp.float16): jnp.uint16, jnp.dtype(jnp.float32): jnp.uint32}


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise ValueError unless `sparsity`, the fraction removed, lies in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name}={sparsity} must be the fraction removed, in [0, 1)")


def keep_count(size: int, sparsity: float) -> int:
    """Entries that a vector of `size` keeps: the smallest multiple of 4 that is >= (1 - sparsity) * size.

    At least 4. 128 at 0.7 gives 40 (a true sparsity of 0.6875). Raises ValueError for a sparsity outside [0, 1).
    """
    check_sparsity("sparsity", sparsity)
    wanted = round((1 - sparsity) * size, 6)  # (1 - 0.7) * 40 is 12.000000000000002 in binary floating point
    return max(4, 4 * math.ceil(wanted / 4))


def magnitude_mask(x: jax.Array, sparsity: float, *, axis: int = -1) -> jax.Array:
    """Keep the largest magnitudes along an axis: the paper's per-token rule when `axis` is head_dim.

    Args:
        x: bfloat16, float16 or float32, any shape.
        sparsity: the fraction removed, in [0, 1).
        axis: the axis whose entries compete.

    Returns:
        bool of x's shape, True where kept, with exactly `keep_count(x.shape[axis], sparsity)` True along `axis` (all,
        where that is more than there are). Of equal magnitudes the lowest index wins. Magnitudes are compared on their
        bits: subnormals count, NaN ranks above infinity, and all NaN are equal.

    Raises:
        ValueError: sparsity outside [0, 1).
        TypeError: a dtype other than the three.
    """
    size = x.shape[axis]
    kept = min(size, keep_count(size, sparsity))
    return jnp.moveaxis(_largest(magnitude_bits(jnp.moveaxis(x, axis, -1)), kept), -1, axis)


METHODS: dict[str, Callable[..., jax.Array]] = {"magnitude": magnitude_mask}
"""The rules by name, as `CompressionConfig.k_method` and `v_method` take them: (x [..., S, H], sparsity) -> mask."""


def rescale_to_norm(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Scale the kept entries of each vector to the whole vector's L2 norm.

    Args:
        x: [..., H].
        mask: bool of x's shape.

    Returns:
        [..., H] in x's dtype: where kept, the entry times ||x|| / ||kept||, computed in float32 and clipped to the
        dtype's largest finite value; where the kept norm is 0 or a norm is not finite, the entry itself. Not kept: as
        it was.
    """
    x32 = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x32, axis=-1, keepdims=True)
    kept_norm = jnp.linalg.norm(jnp.where(mask, x32, 0), axis=-1, keepdims=True)
    usable = (kept_norm > 0) & jnp.isfinite(norm) & jnp.isfinite(kept_norm)
    limit = float(jnp.finfo(x.dtype).max)
    scaled = jnp.clip(x32 * (norm / jnp.where(usable, kept_norm, 1)), -limit, limit)
    return jnp.where(mask & usable, scaled.astype(x.dtype), x)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers that order as |x| does, all NaN being one value above infinity."""
    if x.dtype not in _BITS_OF:
        raise TypeError(f"x has dtype {x.dtype}; wanted bfloat16, float16 or float32")
    unsigned = _BITS_OF[x.dtype]
    infinity = lax.bitcast_convert_type(jnp.array(jnp.inf, x.dtype), unsigned)
    bits = lax.bitcast_convert_type(x, unsigned) & jnp.array(jnp.iinfo(unsigned).max >> 1, unsigned)
    return jnp.minimum(bits, infinity + jnp.array(1, unsigned))


def _largest(bits: jax.Array, count: int) -> jax.Array:
    """Mask of the `count` largest along the last axis, the lowest index first among equals."""
    threshold = kth_largest(bits, count)
    above = bits > threshold
    tied = bits == threshold
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room))


@functools.partial(jax.jit, static_argnames="k")  # so that a call outside jit does not compile its loop each time
def kth_largest(bits: jax.Array, k: int) -> jax.Array:
    """The k-th largest along the last axis, [..., 1], found bit by bit from the highest: no sort, exact.

    The answer is the largest t that at least k entries reach; each step asks whether one more bit of t can be set.
    """
    highest = jnp.iinfo(bits.dtype).bits - 2  # the sign's bit is always clear

    def step(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.array(1, bits.dtype) << (highest - i).astype(bits.dtype))
        reached = jnp.sum(bits >= candidate, axis=-1, keepdims=True) >= k
        return jnp.where(reached, candidate, threshold)

    return lax.fori_loop(0, highest + 1, step, jnp.zeros_like(bits[..., :1]))
