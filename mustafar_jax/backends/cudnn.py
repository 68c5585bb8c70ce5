"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: prompts and dense caches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.backend import Backend, Operation
from mustafar_jax.operands import DenseAttention, PromptAttention
from mustafar_jax.pallas_kernels import cuda

DTYPES = (jnp.bfloat16, jnp.float16)
MIN_COMPUTE_CAPABILITY = 8.0
HOPPER = 9.0
"""From this compute capability on, head_dim may be 256; before, 128."""


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
    return _why_not(operands)


def _why_not_dense(operands: DenseAttention) -> str | None:
    if operands.window is not None:
        return f"cuDNN decoding has no sliding window; got sliding_window={operands.window}"
    if operands.new:
        return "cuDNN decoding attends one token of each sequence"
    return _why_not(operands)


def _why_not(operands: PromptAttention | DenseAttention) -> str | None:
    query, key = operands.query, operands.key
    if operands.soft_cap is not None:
        return f"jax's cuDNN attention has no soft cap; got logits_soft_cap={operands.soft_cap}"
    if operands.return_lse:
        return "jax rounds the log-sum-exp of cuDNN's attention to the query's dtype; wanted float32"
    if query.dtype not in DTYPES or query.dtype != key.dtype:
        return f"cuDNN wants bfloat16 or float16; query is {query.dtype}, keys are {key.dtype}"
    capability, head_dim = cuda.compute_capability(), query.shape[-1]
    if capability is not None and capability < MIN_COMPUTE_CAPABILITY:
        return f"cuDNN's fused attention needs compute capability {MIN_COMPUTE_CAPABILITY}; this GPU has {capability}"
    largest = 256 if capability is None or capability >= HOPPER else 128
    if head_dim % 8 or head_dim > largest:
        return f"cuDNN wants a head_dim that is a multiple of 8 and at most {largest}; got {head_dim=}"
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
