"""What a field of a model's description may hold: whole numbers, real numbers, tokens; in words and as a check."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

MISSING = object()
"""The default of a field that has none: a file must state it."""

A_SIZE = "a positive integer below 2**31"
A_LENGTH = "a positive integer below 2**63"
A_TOKEN = "an integer from 0 to 2**31 - 1"

_INT32, _INT64 = 2**31, 2**63


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a JSON object.

    Attributes:
        wanted: what it may hold, in words: "a positive integer".
        fits: whether a value is such a one.
        default: what a file that leaves it out means.
        nullable: whether null may stand there; it is then read as None.
    """

    wanted: str
    fits: Callable[[Any], bool]
    default: Any = MISSING
    nullable: bool = False

    def problem(self, name: str, fields: Mapping[str, Any], where: str = "") -> str | None:
        """What is wrong with the field called `name`, in words, or None; `where` says which object lacks it."""
        value = fields.get(name, MISSING)
        if value is MISSING:
            return f"{name} is missing{where}" if self.default is MISSING else None
        if (value is None and self.nullable) or self.fits(value):
            return None
        return f"{name}={reprlib.repr(value)} must be {self.wanted}"


def is_size(value: object) -> bool:
    """Whether it is an integer that an axis can be, 1 to 2^31 - 1. True and False are no integers."""
    return is_token(value) and value > 0


def is_length(value: object) -> bool:
    """Whether it is a number of positions, 1 to 2^63 - 1. No array is as long: some files mean that there is no end."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _INT64


def is_token(value: object) -> TypeGuard[int]:
    """Whether it is an integer from 0 to 2^31 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _INT32


def is_tokens(value: object) -> bool:
    """Whether it is a token, or a list or tuple of tokens."""
    return all(map(is_token, value)) if isinstance(value, list | tuple) else is_token(value)


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def is_above_zero(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return is_number(value) and value > 0


def is_at_least_zero(value: Any) -> bool:
    """Whether it is a finite number that is not negative."""
    return is_number(value) and value >= 0


def is_flag(value: object) -> bool:
    """Whether it is True or False."""
    return isinstance(value, bool)


FLAG = Field("true or false", is_flag, default=False)
"""A field that `is_flag`, false where a file leaves it out."""


def size(default: Any = MISSING, *, nullable: bool = False) -> Field:
    """A field that `is_size`."""
    return Field(A_SIZE, is_size, default, nullable)


def length(default: Any = MISSING) -> Field:
    """A field that `is_length`."""
    return Field(A_LENGTH, is_length, default)


def token(default: Any = MISSING) -> Field:
    """A field that `is_token`."""
    return Field(A_TOKEN, is_token, default)


def tokens(default: Any = MISSING) -> Field:
    """A field that `is_tokens`, or null: no token."""
    return Field(f"{A_TOKEN}, or a list of such", is_tokens, default, nullable=True)
