"""LongBench (arXiv 2308.14508) from its data files, with its authors' prompts, truncation and metrics.

A task's file is TASK.jsonl, as its authors publish it. Their prompts come with their code, not with this package:
--prompts names their dataset2prompt.json, which maps each task to a template with {context} and {input}.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mustafar_jax import text
from mustafar_jax.quality import metrics
from mustafar_jax.quality.examples import Example, Problem, read_rows, tokens_of

Metric = Callable[[str, str], float]

TEMPLATE = 64
"""Tokens left for a chat template where the context is filled."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a task is asked and scored.

    Attributes:
        metric: its name in `METRICS`.
        max_new_tokens: that the model writes.
        chat: whether chat models get the prompt in their template; few-shot and code tasks are continued as they are.
        first_line: whether only the first line written counts.
        line_ends: whether a line break ends what the model writes.
    """

    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    line_ends: bool = False


METRICS: dict[str, Metric] = {
    "qa_f1": metrics.qa_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge_l": metrics.rouge_l,
    "rouge_l_zh": metrics.rouge_l_zh,
    "retrieval": metrics.retrieval,
    "count": metrics.count,
    "code_similarity": metrics.code_similarity,
}
"""But for "classification", which needs the names of the classes as well."""

DATASETS = {
    "narrativeqa": Dataset("qa_f1", 128),
    "qasper": Dataset("qa_f1", 128),
    "multifieldqa_en": Dataset("qa_f1", 64),
    "multifieldqa_zh": Dataset("qa_f1_zh", 64),
    "hotpotqa": Dataset("qa_f1", 32),
    "2wikimqa": Dataset("qa_f1", 32),
    "musique": Dataset("qa_f1", 32),
    "dureader": Dataset("rouge_l_zh", 128),
    "gov_report": Dataset("rouge_l", 512),
    "qmsum": Dataset("rouge_l", 512),
    "multi_news": Dataset("rouge_l", 512),
    "vcsum": Dataset("rouge_l_zh", 512),
    "trec": Dataset("classification", 64, chat=False, first_line=True),
    "triviaqa": Dataset("qa_f1", 32, chat=False, first_line=True),
    "samsum": Dataset("rouge_l", 128, chat=False, first_line=True, line_ends=True),
    "lsht": Dataset("classification", 64, chat=False, first_line=True),
    "passage_count": Dataset("count", 32),
    "passage_retrieval_en": Dataset("retrieval", 32),
    "passage_retrieval_zh": Dataset("retrieval", 32),
    "lcc": Dataset("code_similarity", 64, chat=False),
    "repobench-p": Dataset("code_similarity", 64, chat=False),
}

_FIELDS = {"context": str, "input": str, "answers": list}


def examples(
    tokenizer: Any, files: Sequence[pathlib.Path], prompts: pathlib.Path, *, context: int, max_length: int | None = None
) -> tuple[list[Example], list[Problem]]:
    """The examples of LongBench files, and the lines that are left out.

    Args:
        tokenizer: the model's.
        files: TASK.jsonl or TASK_e.jsonl each, TASK a name in `DATASETS`.
        prompts: dataset2prompt.json.
        context: tokens that the model takes at most, prompt and answer together.
        max_length: tokens of a prompt, before it is put in the chat template where there is one; of a longer one the
            middle is cut out, half of them left on each side. If None, what the context has room for.

    Raises:
        ValueError: a file of another name, a file without a usable line, prompts without the task's.
    """
    templates = _templates(prompts)
    found: list[Example] = []
    problems: list[Problem] = []
    for file in files:
        name = file.stem.removesuffix("_e")
        if name not in DATASETS:
            raise ValueError(f"{file} is no LongBench task; the name wants to be one of {sorted(DATASETS)}")
        if not isinstance(templates.get(name), str):
            raise ValueError(f"{prompts} has no prompt for {name}")
        rows, bad = read_rows(file, _FIELDS | ({"all_classes": list} if _is_classification(name) else {}))
        problems += bad
        for line, row in rows:
            what = _problem(name, row)
            if what:
                problems.append(Problem(file.name, line, what))
                continue
            room = context - DATASETS[name].max_new_tokens - TEMPLATE
            prompt = _prompt(tokenizer, templates[name].format(**row), max_length or room, DATASETS[name].chat)
            found.append(_example(tokenizer, file, line, row, prompt))
    if not found:
        raise ValueError(f"no usable line in {[str(file) for file in files]}; the first problem is {problems[0]}")
    return found, problems


def score(name: str, prediction: str, answers: list[str], classes: list[str] | None = None) -> float:
    """0 .. 1: how a task's authors score what was written, against the answer that fits best."""
    task = DATASETS[name]
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if _is_classification(name):
        assert classes is not None
        metric: Metric = functools.partial(_classify, classes)
    else:
        metric = METRICS[task.metric]
    return metrics.best_of(metric, prediction, answers)


def cut_middle(tokens: list[int], length: int) -> tuple[list[int], list[int]]:
    """The first and the last half of `length` tokens; all tokens and none, where there are no more."""
    if len(tokens) <= length:
        return tokens, []
    return tokens[: length // 2], tokens[len(tokens) - length // 2 :]


def _classify(classes: list[str], prediction: str, answer: str) -> float:
    return metrics.classification(prediction, answer, classes)


def _is_classification(name: str) -> bool:
    return DATASETS[name].metric == "classification"


def _problem(name: str, row: dict[str, Any]) -> str:
    """What else is wrong with a row."""
    wrong = [answer for answer in row["answers"] if not isinstance(answer, str) or not answer]
    if wrong:
        return f"field 'answers' holds {wrong[0]!r:.60}; wanted text"
    if DATASETS[name].metric == "retrieval":
        try:
            metrics.retrieval("", row["answers"][0])
        except ValueError as error:
            return str(error)
    return ""


def _templates(file: pathlib.Path) -> dict[str, Any]:
    try:
        templates = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(templates, dict):
        raise ValueError(f"{file} holds a {type(templates).__name__}; wanted an object of prompts by task")
    return templates


def _prompt(tokenizer: Any, prompt: str, max_length: int, chat: bool) -> np.ndarray:
    first, last = cut_middle(tokens_of(tokenizer, prompt), max_length)
    if last:
        prompt = "".join(tokenizer.decode(half, skip_special_tokens=True) for half in (first, last))
    return text.encode(tokenizer, prompt, chat=chat and tokenizer.chat_template is not None)[0]


def _example(tokenizer: Any, file: pathlib.Path, line: int, row: dict[str, Any], prompt: np.ndarray) -> Example:
    name = file.stem.removesuffix("_e")
    answers, classes = row["answers"], row.get("all_classes")
    return Example(
        f"{file.stem}:{row.get('_id', line)}",
        prompt,
        file.stem,
        max_new_tokens=DATASETS[name].max_new_tokens,
        stop=tuple(tokens_of(tokenizer, "\n")[-1:]) if DATASETS[name].line_ends else (),
        score=lambda written: score(name, written, answers, classes),
        info={"answers": answers, "tokens": len(prompt)},
    )
