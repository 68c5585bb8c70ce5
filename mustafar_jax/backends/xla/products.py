"""Products with stored rows in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.operands import Product


def multiply(product: Product) -> jax.Array:
    """The product with the rows as an ordinary array."""
    letters = {"scores": "...gh,...sh->...gs", "sums": "...gs,...sh->...gh"}[product.what]
    both = (x.astype(jnp.float32) for x in (product.x, product.rows.to_array()))
    return jnp.einsum(letters, *both, precision=lax.Precision.HIGHEST)
