"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: prompts and dense caches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.backends.record import Backend, Operation
from mustafar_jax.operands import DenseAttention, PromptAttention

DTYPES = (jnp.bfloat16, jnp.float16)


def _attend_prompt(operands: PromptAttention) -> jax.Array:
    reach = None if operands.window is None else (operands.window - 1, 0)
    return jax.nn.dot_product_attention(
        operands.query,
        operands.key,
        operands.value,
        scale=operands.scale,
        is_causal=True,
        local_window_size=reach,
        implementation="cudnn",
    )


def _attend_dense(operands: DenseAttention) -> jax.Array:
    batch, kv_heads, group, head_dim = operands.query.shape
    out = jax.nn.dot_product_attention(
        operands.query.reshape(batch, 1, kv_heads * group, head_dim),
        operands.key,
        operands.value,
        scale=operands.scale,
        key_value_seq_lengths=operands.lengths,
        implementation="cudnn",
    )
    some = (operands.lengths > 0)[:, None, None, None]
    return jnp.where(some, out.reshape(operands.query.shape), 0)


def _why_not_prompt(operands: PromptAttention) -> str | None:
    return _why_not_dtypes(operands.query.dtype, operands.key.dtype)


def _why_not_dense(operands: DenseAttention) -> str | None:
    if operands.window is not None:
        return f"cuDNN decoding has no sliding window; got sliding_window={operands.window}"
    return _why_not_dtypes(operands.query.dtype, operands.key.dtype)


def _why_not_dtypes(query: Any, key: Any) -> str | None:
    if query not in DTYPES or query != key:
        return f"cuDNN wants bfloat16 or float16; query is {query}, keys are {key}"
    return None


def _or_not_implemented(attend: Callable[[Any], jax.Array]) -> Callable[[Any], jax.Array]:
    """The function, with NotImplementedError for what JAX raises where there is no cuDNN, or too old a one."""

    @functools.wraps(attend)
    def run(operands: Any) -> jax.Array:
        try:
            return attend(operands)
        except RuntimeError as error:
            raise NotImplementedError(f"cuDNN cannot run here: {error}") from error

    return run


CUDNN = Backend(
    name="cudnn",
    needs_cuda=True,
    attend_prompt=Operation(_or_not_implemented(_attend_prompt), _why_not_prompt),
    attend_dense=Operation(_or_not_implemented(_attend_dense), _why_not_dense),
)
