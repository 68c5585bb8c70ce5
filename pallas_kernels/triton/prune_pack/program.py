"""A program of `prune_pack`: what it is given, what it is compiled for, and which thread has what.

A program takes 32 tokens of one head, 64 channels per thread: a thread per token at head_dim 64, two neighbours at 128.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mustafar_jax.layout import WORD, chunk
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.fusion import fuse
from mustafar_jax.rows import Rows

BLOCK = 32
"""Tokens of a program: those that one block of values interleaves."""
THREAD_WORDS = 2
"""Bitmap words per thread."""


class Prune(NamedTuple):
    """Dense keys or values, and where they go.

    Attributes:
        source: [B, S, K, H], or [B, K, S, H] as `prune_pack` is told.
        target: the plain rows with a bitmap that are overwritten; each keeps as many entries as it has slots.
        mean: where keys are centred, what is taken off them before they are pruned; its `offset` is the position of the
            target's row 0.
        rescale: scale what is kept of a vector to the whole vector's L2 norm.
        weight: float32 [B, K, H], what the entries, or what the mean leaves of them, are multiplied by in float32
            before they are compared in the source's dtype; they are held without it.
    """

    source: jax.Array
    target: Rows
    mean: Mean | None = None
    rescale: bool = False
    weight: jax.Array | None = None


def of_head(array: jax.Array, axis: int = 1) -> tuple[jax.Array, pl.BlockSpec]:
    """An operand [B, ...] with heads along an axis: for each program those of its sequence and head."""
    shape = tuple(None if i in (0, axis) else size for i, size in enumerate(array.shape))

    def place(head: Any, block: Any, sequence: Any, *_: Any) -> tuple[Any, ...]:
        return tuple({0: sequence, axis: head}.get(i, 0) for i in range(array.ndim))

    return array, pl.BlockSpec(shape, place)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for.

    Attributes:
        head_dim, dtype: of the source.
        kept: entries that a row keeps, its slots.
        rows: of the target.
        offset: the position of the target's row 0, where keys are centred, else None.
        rescale: see `Prune`.
        weighed: whether there is a weight.
        interpret: use the helpers' plain JAX twins.
    """

    head_dim: int
    dtype: Any
    kept: int
    rows: int
    offset: int | None
    rescale: bool
    weighed: bool
    interpret: bool

    @classmethod
    def of(cls, prune: Prune, interpret: bool) -> "Plan":
        """The plan of one source and target."""
        return cls(
            head_dim=prune.source.shape[3],
            dtype=prune.target.dtype,
            kept=prune.target.slots,
            rows=prune.target.padded_length,
            offset=None if prune.mean is None else prune.mean.offset,
            rescale=prune.rescale,
            weighed=prune.weight is not None,
            interpret=interpret,
        )

    @property
    def parts(self) -> int:
        """Threads per token."""
        return self.head_dim // (WORD * THREAD_WORDS)

    @property
    def threads(self) -> int:
        """Of a program."""
        return BLOCK * self.parts

    @property
    def chunk(self) -> int:
        """Slots that stand together in the target."""
        return chunk(self.kept)

    @property
    def row_words(self) -> int:
        """Words from one token to the next in shared memory: odd, so that tokens stand in different banks."""
        return self.kept // 2 + 1


def lane(plan: Plan) -> jax.Array:
    """The threads' numbers, int32 [threads]."""
    return jnp.arange(plan.threads, dtype=jnp.int32)


def token_of(plan: Plan) -> jax.Array:
    """Which of the block's tokens a thread works on."""
    return lane(plan) // plan.parts


def part_of(plan: Plan) -> jax.Array:
    """Which of its token's threads a thread is: it holds bitmap words `part` and `parts + part`."""
    return lane(plan) % plan.parts


def fused(
    plan: Plan, function: Callable[..., Any], operands: Sequence[jax.Array], *shared: jax.Array, **fixed: int
) -> jax.Array:
    """`fuse` of a function that is given the plan and what is `fixed` by their names."""
    return fuse(functools.partial(function, plan=plan, **fixed), operands, *shared, interpret=plan.interpret)


def floats(words: list[jax.Array], plan: Plan) -> list[jax.Array]:
    """The entries of words, the low and the high one of each, as float32."""
    return [x for word in words for x in tl.float32_pair(word, plan.dtype, interpret=plan.interpret)]


def words_of(numbers: list[jax.Array], plan: Plan) -> list[jax.Array]:
    """The inverse of `floats`."""
    pairs = zip(numbers[0::2], numbers[1::2], strict=True)
    return [tl.pack_pair(*pair, plan.dtype, interpret=plan.interpret) for pair in pairs]


def four_of(columns: list[list[jax.Array]], *, four: int, plan: Plan) -> list[jax.Array]:
    """The first or the second four of eight entries."""
    return floats(columns[0][2 * four : 2 * four + 2], plan)
