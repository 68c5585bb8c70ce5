"""What callers give a cache, checked before any work."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def check_lengths(
    lengths: ArrayLike | Sequence[int] | None, batch: int, longest: int, *, shortest: int = 0
) -> np.ndarray | jax.Array:
    """Lengths as int32 [batch], `longest` each if None; a numpy array unless they are traced.

    Raises ValueError for another shape, a dtype that is not integer, or (where concrete) a value outside
    [shortest, longest].
    """
    if lengths is None:
        return np.full(batch, longest, np.int32)
    given = lengths if isinstance(lengths, jax.Array) else _array(lengths)
    if given.shape != (batch,) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"lengths is {given.dtype}{list(given.shape)}; wanted integers [{batch}]")
    if isinstance(given, jax.core.Tracer):
        return given.astype(jnp.int32)
    given = np.asarray(given)
    if given.min() < shortest or given.max() > longest:
        raise ValueError(f"lengths={given.tolist()} must lie in {shortest} .. {longest}")
    return given.astype(np.int32)


def _array(numbers: Any) -> np.ndarray | jax.Array:
    """Numbers as an array, of numpy unless some are traced."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(numbers))
    return jnp.asarray(numbers) if traced else np.asarray(numbers)


def check_rows(rows: ArrayLike | Sequence[int], batch: int) -> int:
    """How many rows there are; ValueError unless they are different sequences of the batch."""
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.ndim != 1 or given.size == 0 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"rows is {given.dtype}{list(given.shape)}; wanted integers [n], n at least 1")
    if not isinstance(given, jax.core.Tracer):
        given = np.asarray(given)
        if given.min() < 0 or given.max() >= batch or len(np.unique(given)) < len(given):
            raise ValueError(f"rows={given.tolist()} must be different sequences in 0 .. {batch - 1}")
    return given.shape[0]


def check_kv(
    key: jax.Array, value: jax.Array, dtype: np.dtype[Any], wanted: tuple[int | None, ...], letters: str
) -> None:
    """Raise ValueError for keys and values of another shape than `wanted`, TypeError for another dtype."""
    for name, x in (("key", key), ("value", value)):
        fits = x.ndim == len(wanted) and all(want in (None, size) for want, size in zip(wanted, x.shape, strict=True))
        if not fits:
            sizes = ", ".join("S" if size is None else str(size) for size in wanted)
            raise ValueError(f"{name} has shape {x.shape}; the cache wants {letters} = [{sizes}]")
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; the cache holds {dtype}")
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key has {key.shape}; wanted the same")


def check_dtype(given: DTypeLike) -> np.dtype[Any]:
    """The dtype of a cache, or of a model and its cache; TypeError for another, or for none at all."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"dtype={given if dtype is None else dtype.name} must be bfloat16, float16 or float32")
    return dtype


def check_sizes(**sizes: Any) -> None:
    """Raise TypeError for a size that is no integer, ValueError for one below 1."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise TypeError(f"{name}={size!r} must be an integer")
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
