"""Attention over prompts in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.operands import PromptAttention

CHUNK = 512
"""Queries that are attended at a time, so that the scores of all are never held."""


def attend_prompt(operands: PromptAttention) -> jax.Array:
    """Attention over a prompt, some queries at a time."""
    query, key, value = operands.query, operands.key, operands.value
    length, chunk, dtype = query.shape[1], min(query.shape[1], CHUNK), query.dtype
    if dtype == jnp.float16:  # XLA for CPUs has no float16 product with float32 sums
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))

    def attend(start: jax.Array) -> jax.Array:
        # The last chunk is moved back to end with the prompt, so every chunk has the same shape.
        rows = jnp.minimum(start, length - chunk) + jnp.arange(chunk)
        distance = rows[:, None] - jnp.arange(length)[None]
        visible = (distance >= 0) & (distance < (length if operands.window is None else operands.window))
        part = jnp.take(query, rows, axis=1)
        mask = visible[None, None]
        return jax.nn.dot_product_attention(part, key, value, mask=mask, scale=operands.scale).astype(dtype)

    if chunk == length:
        return attend(jnp.int32(0))
    parts = lax.map(attend, jnp.arange(0, length, chunk))  # [chunks, B, chunk, N, H]
    whole = jnp.moveaxis(parts, 0, 1)
    body = whole[:, :-1].reshape(query.shape[0], -1, *query.shape[2:])
    return jnp.concatenate([body, whole[:, -1, body.shape[1] + chunk - length :]], axis=1)
