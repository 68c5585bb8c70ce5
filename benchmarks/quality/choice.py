"""Multiple choice, as in L-Eval's closed tasks: of the answers given, which does the model find likeliest?

Rows of JSON Lines files: {"context": ..., "question": ..., "choices": [...], "answer": index of the right one}.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mustafar_jax.quality.examples import Example, Problem, first_tokens, read_rows, tokens_of
from mustafar_jax.quality.longbench import cut_middle
from mustafar_jax.quality.runs import Record

_FIELDS = {"context": str, "question": str, "choices": list, "answer": int}


def examples(tokenizer: Any, files: Sequence[pathlib.Path], *, context: int) -> tuple[list[Example], list[Problem]]:
    """One example for each choice of each question, to be scored by likelihood, and the lines that are left out.

    Args:
        tokenizer: the model's.
        files: JSON Lines; a group for each.
        context: tokens that the model takes at most; of a longer document the middle is cut out.

    Raises:
        ValueError: a file without a usable line.
    """
    found: list[Example] = []
    problems: list[Problem] = []
    for file in files:
        rows, bad = read_rows(file, _FIELDS)
        problems += bad
        for line, row in rows:
            what = _problem(row)
            if what:
                problems.append(Problem(file.name, line, what))
            else:
                found += _choices(tokenizer, file.stem, line, row, context)
    return found, problems


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


def _problem(row: dict[str, Any]) -> str:
    choices, answer = row["choices"], row["answer"]
    wrong = [choice for choice in choices if not isinstance(choice, str) or not choice]
    if wrong:
        return f"field 'choices' holds {wrong[0]!r:.60}; wanted text"
    if isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"field 'answer' is {answer}; wanted 0 .. {len(choices) - 1}, an index into 'choices'"
    return ""


def _choices(tokenizer: Any, group: str, line: int, row: dict[str, Any], context: int) -> list[Example]:
    before, document = first_tokens(tokenizer), tokens_of(tokenizer, row["context"])
    question = tokens_of(tokenizer, f"\n\nQuestion: {row['question']}\nAnswer:")
    golds = [tokens_of(tokenizer, f" {choice}") for choice in row["choices"]]
    room = context - len(before) - len(question) - max(map(len, golds))
    first, last = cut_middle(document, room)
    prompt = np.asarray([*before, *first, *last, *question], np.int32)
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
