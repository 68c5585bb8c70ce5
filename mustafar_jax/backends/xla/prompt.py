"""Attention over prompts in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.backend import Attended
from mustafar_jax.backends.xla.tiles import Partial, Queries, Scoring, finished, in_parts, over_keys
from mustafar_jax.operands import PromptAttention

CHUNK = 512
"""Queries that are attended at a time, so that the scores of all are never held."""


def attend_prompt(operands: PromptAttention) -> Attended:
    """Attention over a prompt: by `jax.nn` where it can, else a tile of keys at a time."""
    if operands.soft_cap is not None or operands.return_lse:
        return _attend_in_tiles(operands)
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


def _attend_in_tiles(operands: PromptAttention) -> Attended:
    """Attention over a prompt, with its log-sum-exp if that is wanted; float32."""
    batch, length, heads, head_dim = operands.query.shape
    kv_heads = operands.key.shape[2]
    by_head = operands.query.reshape(batch, length, kv_heads, -1, head_dim).swapaxes(1, 2)
    position = jnp.arange(length, dtype=jnp.int32)[None]

    def attend(queries: Queries) -> Partial:
        def see(key: jax.Array) -> jax.Array:
            return (queries.position[..., None] >= key[:, None]) & queries.within(operands.window, key)

        return over_keys(queries, operands.key, operands.value, see, Scoring.of(operands, tokens=length))

    found = in_parts(attend, Queries(by_head.reshape(batch, kv_heads, -1, head_dim), position))

    def by_token(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, kv_heads, length, -1, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(batch, length, heads, *x.shape[4:])

    return jax.tree.map(by_token, finished(found, return_lse=operands.return_lse))
