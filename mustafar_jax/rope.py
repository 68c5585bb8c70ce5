"""Rotary position embeddings in Hugging Face's half-split convention (channel i pairs with i + head_dim / 2)."""

import jax
import jax.numpy as jnp
from jax import lax


def rotate(x: jax.Array, positions: jax.Array, inv_freq: jax.Array) -> jax.Array:
    """Rotate vectors to their positions: R_s x.

    Args:
        x: [..., H], any float dtype; computed in float32.
        positions: integers that broadcast against x's leading axes; negative positions rotate back.
        inv_freq: float32 [H / 2], radians per position.

    Returns:
        float32 [..., H].
    """
    positions, inv_freq = lax.broadcast_to_rank(positions, x.ndim - 1), lax.broadcast_to_rank(inv_freq, x.ndim)
    return rotate_by(x, positions[..., None].astype(jnp.float32) * inv_freq.astype(jnp.float32))


def rotate_by(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate each pair of channels by an angle of its own.

    Args:
        x: [..., H], any float dtype; computed in float32.
        angles: float32 [..., H / 2], radians; leading axes broadcast against x's.

    Returns:
        float32 [..., H].
    """
    # The halves exchanged by a reversal: a concatenation would be a kernel of its own on GPUs, and fuse with nothing.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    sine = lax.broadcast_to_rank(jnp.array([[-1], [1]], jnp.float32), halves.ndim) * sin
    return lax.collapse(halves * cos + lax.rev(halves, (halves.ndim - 2,)) * sine, halves.ndim - 2)
