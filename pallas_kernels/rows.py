"""What the kernels ask of rows, whichever backend lowers them."""

import dataclasses
import itertools
from collections.abc import Callable, Set
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.backend import Attended
from mustafar_jax.operands import PackedAttention, Tail
from mustafar_jax.rows import Rows


def is_dense(rows: Rows) -> bool:
    """Whether rows are an ordinary array."""
    return rows.bitmap is None and rows.is_plain


_MOST_NEW = 32
"""New tokens of each sequence: for more, reading a cache once for every 16 queries takes longer than other ways."""
_MOST_QUERIES = 16
"""Query heads of a KV head that a kernel takes: the rows of a matrix product."""

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
    if operands.new > _MOST_NEW:
        return f"the kernels attend up to {_MOST_NEW} new tokens at once; got {operands.new}"
    if operands.new and operands.window is not None:
        return f"the kernels attend several new tokens without a sliding window; got sliding_window={operands.window}"
    queries = min(query.shape[2], _MOST_QUERIES) if operands.new else query.shape[2]
    reasons = [
        why_not(dtype=query.dtype, head_dim=query.shape[3], queries_per_head=queries),
        why_not_rows(operands.key, query.dtype, key_codes),
        why_not_rows(operands.value, query.dtype, value_codes),
    ]
    return next((reason for reason in reasons if reason), None)


def by_queries(attend: Callable[[PackedAttention], Attended], operands: PackedAttention) -> Attended:
    """Attend queries of several new tokens, all of which see the same, some at a time, as one token's query heads.

    Args:
        attend: with `operands.return_lse` gives float32 [B, K, G] beside what it gives anyway, [B, K, G, H].
        operands: of any number of queries.
    """
    count = operands.query.shape[2]
    parts = -(-count // _MOST_QUERIES)
    if parts == 1:
        return attend(operands)
    edges = [part * count // parts for part in range(parts + 1)]  # as even as can be, so few kernels are compiled
    pieces = [operands.query[:, :, first:last] for first, last in itertools.pairwise(edges)]
    found = [attend(dataclasses.replace(operands, query=piece)) for piece in pieces]
    joined: Attended = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *found)
    return joined


def check_tail(tail: Tail, dtype: Any) -> None:
    """Raise NotImplementedError where the tokens that are not packed are of another dtype than the query."""
    if {tail.key.dtype, tail.value.dtype} != {dtype}:
        raise NotImplementedError(
            f"the kernels take one dtype; got {dtype} and tokens of {tail.key.dtype} and {tail.value.dtype}"
        )
