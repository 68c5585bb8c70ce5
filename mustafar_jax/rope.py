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
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
