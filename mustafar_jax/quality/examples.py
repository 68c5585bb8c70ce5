"""Examples that an evaluation asks a model, and the files that they come from."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        min_new_tokens: that it writes before a token may end it.
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

    @property
    def after(self) -> int:
        """Tokens that follow the prompt: the continuation's, or those that the model writes at most."""
        return self.max_new_tokens if self.gold is None else len(self.gold)


@dataclasses.dataclass(frozen=True, order=True)
class Problem:
    """What is wrong with a line of a data file, counted from 1, or, as line 0, with all of it."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.what}"


Row = tuple[int, dict[str, Any]]


def read_rows(file: pathlib.Path, fields: Mapping[str, type | tuple[type, ...]]) -> tuple[list[Row], list[Problem]]:
    """The objects of a JSON Lines file with their line numbers, and what is wrong with the lines that are left out.

    Args:
        file: UTF-8, one JSON object per line; empty lines are skipped. Without a usable line it has one
            problem, of the file.
        fields: that an object must have, and their types; a list must hold texts, of which one is not empty.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append((number, _row(line, fields)))
            except ValueError as error:
                problems.append(Problem(str(file), number, str(error)))
    if not rows:
        first = f"; the first problem is in line {problems[0].line}: {problems[0].what}" if problems else ""
        problems = [Problem(str(file), 0, f"no usable line{first}")]
    return rows, problems


def usable(examples: list[Example], problems: Iterable[Problem]) -> tuple[list[Example], list[Problem]]:
    """What an evaluation has found, the problems by file and line; ValueError where there is no example."""
    ordered = sorted(problems)
    if not examples:
        raise ValueError(f"nothing to evaluate: {'; '.join(map(str, ordered[:3]))}")
    return examples, ordered


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


def tokens_after(tokenizer: Any, text: str, before: str = "a") -> list[int]:
    """The tokens of a text that continues another one.

    SentencePiece tokenizers put a blank before the first word of a text, so " 7" alone begins with two of them. Both
    texts are encoded together, therefore, and the tokens of the first taken off. Where tokens span the seam, the text's
    own are given.
    """
    head, whole = tokens_of(tokenizer, before), tokens_of(tokenizer, before + text)
    return whole[len(head) :] if whole[: len(head)] == head else tokens_of(tokenizer, text)


def first_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text."""
    with_text, text = tokenizer("a")["input_ids"], tokens_of(tokenizer, "a")
    return list(with_text[: with_text.index(text[0])])


def _row(line: bytes, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A line's object; ValueError says what is wrong with it."""
    row = _parsed(line)
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; wanted an object")
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"no field {name!r}; it has {sorted(row)}")
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):  # true is an int to Python
            raise ValueError(f"field {name!r} is {value!r:.60}; wanted {_names(kind)}")
        if isinstance(value, list):
            _check_texts(name, value)
    return row


def _parsed(line: bytes) -> Any:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character, {error.object[error.start]!r}, which no text may hold") from error
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    return row


def _check_texts(name: str, texts: list[Any]) -> None:
    if not texts:
        raise ValueError(f"field {name!r} is an empty list")
    wrong = [each for each in texts if not isinstance(each, str)]
    if wrong:
        raise ValueError(f"field {name!r} holds {wrong[0]!r:.60}; wanted text")
    if not any(each.strip() for each in texts):
        raise ValueError(f"field {name!r} holds {texts[0]!r:.60} and no other text; wanted some that is not empty")


def _names(kind: type | tuple[type, ...]) -> str:
    kinds: Sequence[type] = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(each.__name__ for each in kinds)
