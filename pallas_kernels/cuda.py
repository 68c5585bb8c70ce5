"""What all kernels for NVIDIA GPUs ask of jax, whichever backend lowers them."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir


@functools.cache
def _first_gpu() -> Any:
    """None where jax has no CUDA GPU."""
    with contextlib.suppress(RuntimeError):
        return jax.devices("cuda")[0]
    return None


def device_kind() -> str | None:
    """The first GPU's name; None where jax has none."""
    gpu = _first_gpu()
    return None if gpu is None else gpu.device_kind


def compute_capability() -> float | None:
    """Of the first GPU; None where jax has none."""
    gpu = _first_gpu()
    return None if gpu is None else float(gpu.compute_capability)


def core_count() -> int | None:
    """Multiprocessors of the first GPU; None where jax has none."""
    gpu = _first_gpu()
    return None if gpu is None else int(gpu.core_count)


def why_not(
    kernels: str, runs_on: Callable[[float], bool], needed: str, *, dtype: Any, head_dim: int, queries_per_head: int
) -> str | None:
    """Why kernels cannot run something, in words, or None.

    Only static facts count, and the compute capability where jax has a GPU: never the default backend.

    Args:
        kernels: which ones, in words.
        runs_on: whether they run on a compute capability.
        needed: the compute capability that they want, in words.
        dtype: of queries, keys and values.
        head_dim: channels of a head.
        queries_per_head: query heads that share a KV head.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the {kernels} kernels take bfloat16 and float16; got dtype={jnp.dtype(dtype)}"
    if head_dim not in (64, 128):
        return f"the {kernels} kernels take head_dim 64 and 128; got {head_dim=}"
    if queries_per_head > 16:
        return f"the {kernels} kernels take at most 16 query heads per KV head; got {queries_per_head}"
    capability = compute_capability()
    if capability is not None and not runs_on(capability):
        return f"the {kernels} kernels need compute capability {needed}; this GPU has {capability}"
    return None


def only(x: jax.Array, *, kernels: str, before: Callable[[], None] = lambda: None) -> jax.Array:
    """The identity; lowering it for another platform than CUDA raises NotImplementedError.

    Pallas itself raises ValueError on a CPU; callers that fall back on NotImplementedError need that type.

    Args:
        x: what the kernels are to take.
        kernels: which ones, in words.
        before: called when it is lowered, which is right before the kernels are.
    """
    return _only_p.bind(x, kernels=kernels, before=before)


_only_p = core.Primitive("cuda_only")
_only_p.def_abstract_eval(lambda x, **_: x)
_only_p.def_impl(lambda x, **options: jax.jit(functools.partial(_only_p.bind, **options))(x))


def _lower_elsewhere(_context: Any, _x: Any, *, kernels: str, before: Callable[[], None]) -> Any:
    raise NotImplementedError(f"the {kernels} kernels lower for CUDA alone; implementation=None or 'xla' runs here")


def _lower_for_cuda(_context: Any, x: Any, *, kernels: str, before: Callable[[], None]) -> list[Any]:
    before()
    return [x]


batching.defvectorized(_only_p)
mlir.register_lowering(_only_p, _lower_elsewhere)
mlir.register_lowering(_only_p, _lower_for_cuda, platform="cuda")
