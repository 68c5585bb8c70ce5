"""Examples that an evaluation asks a model, and the files that they come from."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, and what to make of what follows it: a given continuation is scored, or the model writes.

    Attributes:
        id: unique within the evaluation.
        prompt: int32 [S].
        group: metrics are given for each group and for all examples.
        gold: int32 [n], the continuation to score; None where the model writes.
        max_new_tokens: that the model writes.
        min_new_tokens: before which no stop token is written.
        stop: tokens that end what it writes, beside the model's own.
        score: what it wrote -> 0 .. 1.
        info: what else its record says.
    """

    id: str
    prompt: np.ndarray
    group: str = ""
    gold: np.ndarray | None = None
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    stop: tuple[int, ...] = ()
    score: Callable[[str], float] | None = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a line of a data file; the lines are counted from 1."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


Row = tuple[int, dict[str, Any]]


def read_rows(file: pathlib.Path, fields: Mapping[str, type | tuple[type, ...]]) -> tuple[list[Row], list[Problem]]:
    """The objects of a JSON Lines file with their line numbers, and what is wrong with the lines that are left out.

    Args:
        file: UTF-8, one JSON object per line; empty lines are skipped.
        fields: that an object must have, and their types; a list must hold something.

    Raises:
        ValueError: no line is of use, with the first one's problem.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            what = _problem(line, fields)
            if what:
                problems.append(Problem(file.name, number, what))
            else:
                rows.append((number, json.loads(line)))
    if not rows:
        raise ValueError(f"{file} holds no usable line" + (f"; the first problem is {problems[0]}" if problems else ""))
    return rows, problems


def read_text(file: pathlib.Path) -> str:
    """A UTF-8 text; ValueError where it is not one, or empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{file} is empty; wanted text")
    return text


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without the special ones that a tokenizer puts around texts."""
    return list(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    )  # verbose: it warns of long texts


def first_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text."""
    with_text, text = tokenizer("a")["input_ids"], tokens_of(tokenizer, "a")
    return list(with_text[: with_text.index(text[0])])


def _problem(line: bytes, fields: Mapping[str, type | tuple[type, ...]]) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"no JSON: {error}"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}; wanted an object"
    for name, kind in fields.items():
        if name not in row:
            return f"no field {name!r}; it has {sorted(row)}"
        if not isinstance(row[name], kind):
            return f"field {name!r} is {row[name]!r:.60}; wanted {_names(kind)}"
        if isinstance(row[name], list) and not row[name]:
            return f"field {name!r} is an empty list"
    return ""


def _names(kind: type | tuple[type, ...]) -> str:
    kinds: Sequence[type] = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(each.__name__ for each in kinds)
