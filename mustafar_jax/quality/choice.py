"""Multiple choice, as in L-Eval's closed tasks: of the answers given, which does the model find likeliest?

A file holds JSON Lines, one object per line, with the fields

    context   text, the document
    question  text
    choices   list of texts, none of them empty
    answer    int, the index of the right choice, from 0

The prompt is the document, then the question; each choice is scored behind a blank.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mustafar_jax.quality.examples import (
    Example,
    Problem,
    first_tokens,
    read_rows,
    tokens_after,
    tokens_of,
    usable,
)
from mustafar_jax.quality.longbench import cut_middle
from mustafar_jax.quality.runs import Record

_FIELDS = {"context": str, "question": str, "choices": list, "answer": int}


def examples(tokenizer: Any, files: Sequence[pathlib.Path], *, context: int) -> tuple[list[Example], list[Problem]]:
    """One example for each choice of each question, to be scored by likelihood, and what is left out.

    Args:
        tokenizer: the model's.
        files: JSON Lines; a group for each.
        context: tokens that the model takes at most; of a longer document the middle is cut out.

    Raises:
        ValueError: no usable line in any file.
    """
    found: list[Example] = []
    problems: list[Problem] = []
    for file in files:
        rows, bad = read_rows(file, _FIELDS)
        problems += bad
        for line, row in rows:
            try:
                found += _choices(tokenizer, file.stem, line, row, context)
            except ValueError as error:
                problems.append(Problem(str(file), line, str(error)))
    return usable(found, problems)


def accuracy(records: Sequence[Record]) -> list[Record]:
    """A record for each question, of its choices': whether the likeliest per token is the right one.

    Questions of which a choice has no record yet are left out.
    """
    questions: dict[str, list[Record]] = {}
    for record in records:
        questions.setdefault(record["question"], []).append(record)
    return [
        {"id": question, "group": choices[0]["group"], "scores": {"accuracy": float(_likeliest(choices)["right"])}}
        for question, choices in questions.items()
        if len(choices) == choices[0]["choices"]
    ]


def _likeliest(choices: list[Record]) -> Record:
    return min(choices, key=lambda record: record["scores"]["loss"])


def _check(row: dict[str, Any]) -> None:
    choices, answer = row["choices"], row["answer"]
    if not all(choices):
        raise ValueError("field 'choices' holds ''; wanted text")
    if not 0 <= answer < len(choices):
        raise ValueError(f"field 'answer' is {answer}; wanted 0 .. {len(choices) - 1}, an index into 'choices'")


def _choices(tokenizer: Any, group: str, line: int, row: dict[str, Any], context: int) -> list[Example]:
    """The examples of a question; ValueError says why there are none."""
    _check(row)
    question = f"\n\nQuestion: {row['question']}\nAnswer:"
    before, after = first_tokens(tokenizer), tokens_after(tokenizer, question)
    golds = [tokens_after(tokenizer, f" {choice}", before=question) for choice in row["choices"]]
    beside = len(before) + len(after) + max(map(len, golds))
    if context - beside < 1:
        raise ValueError(f"{context=} leaves no room for the document beside {beside} tokens of question and choice")
    first, last = cut_middle(tokens_of(tokenizer, row["context"]), context - beside)
    prompt = np.asarray([*before, *first, *last, *after], np.int32)
    return [
        Example(
            f"{group}:{line}:{index}",
            prompt,
            group,
            gold=np.asarray(gold, np.int32),
            info={"question": f"{group}:{line}", "right": index == row["answer"], "choices": len(golds)},
        )
        for index, gold in enumerate(golds)
    ]
