"""The rotation of vectors that are coded without a bitmap.

A code of few bits with one scale a row suits rows whose entries are alike. A Hadamard matrix with signs makes them so:
each entry becomes a sum of all, so that no channel stands out (as in QuaRot, arXiv 2404.00456).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def block_size(head_dim: int) -> int:
    """The largest power of two that divides head_dim: channels that are turned together."""
    return head_dim & -head_dim


@functools.cache
def matrix(head_dim: int) -> np.ndarray:
    """float32 [H, H], orthogonal: a fixed sign for each channel, then a Hadamard matrix over each block of channels."""
    size = block_size(head_dim)
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = np.kron(np.eye(head_dim // size), hadamard / np.sqrt(size))
    return (signs(head_dim)[:, None] * blocks).astype(np.float32)


SIGNS = 0x9E3779B1
"""2**32 / the golden ratio: the highest bit of a channel's multiple of it says whether its sign is minus."""


def signs(head_dim: int) -> np.ndarray:
    """int [H]: 1 or -1 for each channel."""
    return 1 - 2 * (np.arange(head_dim, dtype=np.uint32) * np.uint32(SIGNS) >> np.uint32(31)).astype(int)


def turn(x: jax.Array) -> jax.Array:
    """Rotate vectors [..., H]; float32.

    What is not finite, or so large that a sum of it might not be (above float32's largest / sqrt(block)), makes its
    vector NaN, and no other.
    """
    limit = float(np.finfo(np.float32).max) / block_size(x.shape[-1]) ** 0.5
    exact = x.astype(jnp.float32)
    exact = jnp.where(jnp.abs(exact) <= limit, exact, jnp.nan)
    return _product(exact, matrix(x.shape[-1]))


def turn_back(x: jax.Array) -> jax.Array:
    """The inverse of `turn`, but for rounding; float32."""
    return _product(x.astype(jnp.float32), matrix(x.shape[-1]).T)


def _product(x: jax.Array, turning: np.ndarray) -> jax.Array:
    return jnp.einsum("...h,hi->...i", x, jnp.asarray(turning), precision=lax.Precision.HIGHEST)
