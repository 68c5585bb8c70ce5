"""What the kernels ask of rows, whichever backend lowers them."""

from collections.abc import Callable, Sequence
from typing import Any

from mustafar_jax.operands import PackedAttention, Tail
from mustafar_jax.rows import Rows


def is_dense(rows: Rows) -> bool:
    """Whether rows are an ordinary array."""
    return rows.bitmap is None and rows.is_plain


def why_not_rows(rows: Rows, dtype: Any, bits: Sequence[int] = ()) -> str | None:
    """Why rows cannot be multiplied with what is of `dtype`, in words, or None; `bits` as in `why_not_attend`."""
    if not rows.is_plain and (rows.bitmap is not None or rows.codec.bits not in bits):
        taken = f"plain numbers and, without a bitmap, codes of {bits} bits" if bits else "plain numbers"
        held = "" if rows.bitmap is None else " behind a bitmap"
        return f"the kernels take {taken}; got rows of {rows.codec.name}{held}"
    if rows.is_plain and rows.dtype != dtype:
        return f"the kernels take one dtype; got {dtype} and rows of {rows.dtype}"
    return None


def check_rows(key: Rows, value: Rows, dtype: Any, bits: Sequence[int] = ()) -> None:
    """Raise NotImplementedError for what `why_not_rows` says; ValueError where there are not as many of both."""
    for rows in (key, value):
        if reason := why_not_rows(rows, dtype, bits):
            raise NotImplementedError(reason)
    if key.padded_length != value.padded_length:
        given = f"{key.padded_length} rows of keys and {value.padded_length} of values"
        raise ValueError(f"there are {given}; wanted as many")


def why_not_attend(
    operands: PackedAttention, why_not: Callable[..., str | None], bits: Sequence[int] = ()
) -> str | None:
    """Why kernels cannot attend, in words, or None.

    Args:
        operands: what they would attend.
        why_not: says so of a dtype, a head_dim and query heads.
        bits: of codes without a bitmap that the kernels take.
    """
    query = operands.query
    reason = why_not(dtype=query.dtype, head_dim=query.shape[3], queries_per_head=query.shape[2])
    reasons = [reason, *(why_not_rows(rows, query.dtype, bits) for rows in (operands.key, operands.value))]
    return next((reason for reason in reasons if reason), None)


def check_tail(tail: Tail, dtype: Any) -> None:
    """Raise NotImplementedError where the tokens that are not packed are of another dtype than the query."""
    if {tail.key.dtype, tail.value.dtype} != {dtype}:
        raise NotImplementedError(
            f"the kernels take one dtype; got {dtype} and tokens of {tail.key.dtype} and {tail.value.dtype}"
        )
