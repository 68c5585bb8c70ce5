"""What all kernels for NVIDIA GPUs ask of jax, whichever backend lowers them."""

import contextlib
import functools
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import mlir


@functools.cache
def compute_capability() -> float | None:
    """Of the first GPU; None where jax has none, or not a CUDA one."""
    with contextlib.suppress(RuntimeError, ValueError):
        return float(jax.devices("cuda")[0].compute_capability)
    return None


def only(x: jax.Array, *, kernels: str) -> jax.Array:
    """The identity; lowering it for another platform than CUDA raises NotImplementedError.

    Pallas itself raises ValueError on a CPU; callers that fall back on NotImplementedError need that type.
    """
    return _only_p.bind(x, kernels=kernels)


_only_p = core.Primitive("cuda_only")
_only_p.def_abstract_eval(lambda x, **_: x)
_only_p.def_impl(lambda x, **options: jax.jit(functools.partial(_only_p.bind, **options))(x))


def _lower_elsewhere(_context: Any, _x: Any, *, kernels: str) -> Any:
    raise NotImplementedError(f"the {kernels} kernels lower for CUDA alone; elsewhere pass interpret=True, or use XLA")


mlir.register_lowering(_only_p, _lower_elsewhere)
mlir.register_lowering(_only_p, lambda _context, x, **_: [x], platform="cuda")
