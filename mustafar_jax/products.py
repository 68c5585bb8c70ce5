"""The published kernels' two products, on stored rows: queries with keys, attention probabilities with values."""

import functools
from typing import Any

import jax

from mustafar_jax.backends import registry
from mustafar_jax.backends.registry import Candidates, Implementation
from mustafar_jax.operands import Product
from mustafar_jax.rows import Rows


def key_spmv(query: jax.Array, packed: Rows, *, implementation: Implementation = None) -> jax.Array:
    """Scores of packed keys: query . key, unscaled.

    Args:
        query: [..., G, H], the G query heads that share a KV head.
        packed: keys [..., S, H].
        implementation: "triton" (NVIDIA GPUs; bfloat16 and float16, the same for both arguments, head_dim 64 and 128,
            plain rows with a bitmap), "xla", a sequence of names (the first that can run this is taken), or None for
            the best that works here.

    Returns:
        float32 [..., G, S].

    Raises:
        ValueError: shapes that do not fit, an unknown implementation.
        TypeError: packed is not `Rows`.
        NotImplementedError: no implementation that was named can run this.
    """
    _check("query", query, packed, "head_dim")
    return _multiply("scores", query, packed, registry.candidates("multiply", implementation))


def value_spmv(probabilities: jax.Array, packed: Rows, *, implementation: Implementation = None) -> jax.Array:
    """Sums of packed values, weighted by attention probabilities.

    Args:
        probabilities: [..., G, S].
        packed: values [..., S, H].
        implementation: as in `key_spmv`; for "triton" the probabilities must have the values' dtype.

    Returns:
        float32 [..., G, H].

    Raises:
        ValueError, TypeError, NotImplementedError: as `key_spmv`.
    """
    _check("probabilities", probabilities, packed, "length")
    return _multiply("sums", probabilities, packed, registry.candidates("multiply", implementation))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
@functools.partial(jax.jit, static_argnums=(0, 3))  # so that a call outside jit does not compile each time
def _multiply(what: Any, x: jax.Array, packed: Rows, chosen: Candidates) -> jax.Array:
    out: jax.Array = registry.run("multiply", Product(what, x, packed), chosen)
    return out


@_multiply.defjvp
def _tangent(
    what: Any, chosen: Candidates, primals: tuple[jax.Array, Rows], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    """Linear in x; no gradient flows through stored entries: see `pack`."""
    tangent: jax.Array = registry.run("multiply", Product(what, tangents[0], primals[1]), Candidates(("xla",)))
    return _multiply(what, *primals, chosen), tangent


def _check(name: str, x: jax.Array, packed: Rows, contracted: str) -> None:
    if not isinstance(packed, Rows):
        raise TypeError(f"packed is of type {type(packed).__name__}; wanted Rows, as mustafar_jax.pack gives them")
    wanted = getattr(packed, contracted)
    if x.ndim != packed.ndim or x.shape[:-2] != packed.shape[:-2] or x.shape[-1] != wanted:
        raise ValueError(
            f"{name} has shape {x.shape}; wanted [*{packed.shape[:-2]}, G, {wanted}] for packed {packed.shape}"
        )
