"""What the kernels ask of rows, whichever backend lowers them."""

from collections.abc import Callable, Set
from typing import Any

from mustafar_jax.operands import PackedAttention, Tail
from mustafar_jax.rows import Rows


def is_dense(rows: Rows) -> bool:
    """Whether rows are an ordinary array."""
    return rows.bitmap is None and rows.is_plain


Codes = Set[tuple[bool, int]]
"""Codes that kernels take: (whether they stand behind a bitmap, bits)."""


def why_not_rows(rows: Rows, dtype: Any, codes: Codes = frozenset()) -> str | None:
    """Why rows cannot be multiplied with what is of `dtype`, in words, or None."""
    if rows.is_plain:
        return None if rows.dtype == dtype else f"the kernels take one dtype; got {dtype} and rows of {rows.dtype}"
    pruned = rows.bitmap is not None
    if (pruned, rows.codec.bits) in codes:
        return None
    bits = sorted(bits for behind, bits in codes if behind == pruned)
    taken = f"plain numbers or codes of {bits} bits" if bits else "plain numbers"
    return f"the kernels take {taken}{' behind a bitmap' * pruned}; got rows of {rows.codec.name}"


def check_rows(
    key: Rows, value: Rows, dtype: Any, key_codes: Codes = frozenset(), value_codes: Codes = frozenset()
) -> None:
    """Raise NotImplementedError for what `why_not_rows` says; ValueError where there are not as many of both."""
    for rows, codes in ((key, key_codes), (value, value_codes)):
        if reason := why_not_rows(rows, dtype, codes):
            raise NotImplementedError(reason)
    if key.padded_length != value.padded_length:
        given = f"{key.padded_length} rows of keys and {value.padded_length} of values"
        raise ValueError(f"there are {given}; wanted as many")


def why_not_attend(
    operands: PackedAttention,
    why_not: Callable[..., str | None],
    key_codes: Codes = frozenset(),
    value_codes: Codes = frozenset(),
) -> str | None:
    """Why kernels cannot attend, in words, or None; `why_not` says so of a dtype, a head_dim and query heads."""
    query = operands.query
    if operands.soft_cap is not None:
        return f"the kernels have no soft cap; got logits_soft_cap={operands.soft_cap}"
    if operands.return_lse:
        return "the kernels do not give the log-sum-exp of scores"
    if operands.new:
        return "the kernels attend one token of each sequence"
    reasons = [
        why_not(dtype=query.dtype, head_dim=query.shape[3], queries_per_head=query.shape[2]),
        why_not_rows(operands.key, query.dtype, key_codes),
        why_not_rows(operands.value, query.dtype, value_codes),
    ]
    return next((reason for reason in reasons if reason), None)


def check_tail(tail: Tail, dtype: Any) -> None:
    """Raise NotImplementedError where the tokens that are not packed are of another dtype than the query."""
    if {tail.key.dtype, tail.value.dtype} != {dtype}:
        raise NotImplementedError(
            f"the kernels take one dtype; got {dtype} and tokens of {tail.key.dtype} and {tail.value.dtype}"
        )
