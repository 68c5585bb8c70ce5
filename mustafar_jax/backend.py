"""What a backend is. This module imports no backend, so that each can import it."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import jax

from mustafar_jax.operands import DenseAttention, PackedAttention, Packing, Product, PromptAttention
from mustafar_jax.rows import Rows

Operands = TypeVar("Operands")
Result = TypeVar("Result")

Attended = jax.Array | tuple[jax.Array, jax.Array]
"""What attention gives, or that and the log-sum-exp of its scores."""

OperationName = Literal["attend_prompt", "attend_dense", "attend_packed", "pack", "multiply"]


def _nothing_against(_operands: Any) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Operation(Generic[Operands, Result]):
    """One thing that a backend does.

    Attributes:
        run: computes it. It may still raise NotImplementedError for what only tracing finds out.
        why_not: says in words why it cannot run these operands, or None. Only what is static counts: shapes, dtypes,
            formats, the version of jax, the compute capability where jax has a GPU. Arrays may be shapes alone.
    """

    run: Callable[[Operands], Result]
    why_not: Callable[[Operands], str | None] = _nothing_against


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention, packing or products; None for what it does not do.

    Attributes:
        name: as `implementation` takes it.
        needs_cuda: whether it wants an NVIDIA GPU.
        attend_prompt: -> [B, S, N, H]; if wanted with the log-sum-exp of the scores, float32 [B, S, N].
        attend_dense, attend_packed: -> what the query is shaped as, zeros where it sees no token; if wanted with the
            log-sum-exp, float32 [B, K, ..], -inf where it sees none.
        pack: -> the targets of keys and of values with the tokens in them.
        multiply: -> float32 [..., G, S] or [..., G, H].
    """

    name: str
    needs_cuda: bool = False
    attend_prompt: Operation[PromptAttention, Attended] | None = None
    attend_dense: Operation[DenseAttention, Attended] | None = None
    attend_packed: Operation[PackedAttention, Attended] | None = None
    pack: Operation[Packing, tuple[Rows, Rows]] | None = None
    multiply: Operation[Product, jax.Array] | None = None

    def operation(self, name: OperationName) -> Operation[Any, Any] | None:
        """The operation of this name."""
        operation: Operation[Any, Any] | None = getattr(self, name)
        return operation


def missing_from_jax(module: str) -> str | None:
    """Why a part of jax cannot be imported, or None. Pallas's backends are experimental: a version may lack one."""
    try:
        importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} lacks {module} ({error})"
    return None
