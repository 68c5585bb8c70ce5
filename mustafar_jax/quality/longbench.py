"""LongBench (arXiv 2308.14508) from its data files, with its authors' prompts, truncation and metrics.

A task's file is TASK.jsonl, as its authors publish it, the user's own or the hub's. Their prompts come with their code,
not with this package: --prompts names their dataset2prompt.json, which maps each task to a template with {context} and
{input}. LongBench-E's files, TASK_e.jsonl, are scored in three groups by the `length` of their rows in words, as its
authors do.
"""

import dataclasses
import functools
import json
import pathlib
import string
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mustafar_jax.generation import text
from mustafar_jax.quality import metrics
from mustafar_jax.quality.examples import Example, Problem, first_tokens, read_rows, tokens_of, usable

Metric = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a task is asked and scored.

    Attributes:
        metric: its name in `METRICS`.
        max_new_tokens: that the model writes.
        chat: whether chat models get the prompt in their template; few-shot and code tasks are continued as they are.
        first_line: whether only the first line written counts.
        line_ends: whether a line break, but for one at the beginning, ends what the model writes.
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

HUB = "THUDM/LongBench"
"""Where its authors keep the tasks' files on the Hugging Face hub."""

_FIELDS = {"context": str, "input": str, "answers": list}


def locate(file: pathlib.Path) -> pathlib.Path:
    """The file; or where there is none and a task is named, or TASK_e, that task's from the hub, kept in its cache.

    Raises ValueError where the hub cannot be reached.
    """
    if file.exists() or str(file).removesuffix("_e") not in DATASETS:
        return file
    import huggingface_hub  # only the hub's tasks need it

    try:
        archive = pathlib.Path(huggingface_hub.hf_hub_download(HUB, "data.zip", repo_type="dataset"))
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise ValueError(f"{file} is no file, and LongBench's own cannot be had from the hub: {error}") from error
    with zipfile.ZipFile(archive) as members:
        return pathlib.Path(members.extract(f"data/{file}.jsonl", archive.parent))


def examples(
    tokenizer: Any, files: Sequence[pathlib.Path], prompts: pathlib.Path, *, context: int, max_length: int | None = None
) -> tuple[list[Example], list[Problem]]:
    """The examples of LongBench files, and the lines and files that are left out.

    Args:
        tokenizer: the model's.
        files: TASK.jsonl or TASK_e.jsonl each, TASK a name in `DATASETS`.
        prompts: dataset2prompt.json.
        context: tokens that the model takes at most, prompt and answer together.
        max_length: tokens of a prompt before it is put in the chat template, those that the tokenizer puts first
            included; of a longer one the middle is cut out, half of them left on each side. If None, or more than the
            context has room for, as many as it has.

    Raises:
        ValueError: no usable line in any file; prompts that are no JSON object, or with other fields than `context` and
            `input`; no room for a prompt; a Chinese task without the package jieba.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"{max_length=} must be at least 1; None takes what the context has room for")
    templates = _templates(prompts)
    found: dict[str, Example] = {}
    problems: list[Problem] = []
    for file in files:
        name = file.stem.removesuffix("_e")
        what = _unknown(name, prompts, templates)
        if what:
            problems.append(Problem(str(file), 0, what))
            continue
        _check_template(prompts, name, templates[name])
        if DATASETS[name].metric.endswith("_zh"):
            metrics.chinese_cutter()
        room = _room(tokenizer, name, context, max_length)
        problems += _add(found, tokenizer, file, templates[name], room)
    return usable(list(found.values()), problems)


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


def _unknown(name: str, prompts: pathlib.Path, templates: dict[str, Any]) -> str:
    """Why a file's name is of no use."""
    if name not in DATASETS:
        return f"no LongBench task; the name wants to be one of {sorted(DATASETS)}"
    return "" if isinstance(templates.get(name), str) else f"{prompts} has no prompt for {name}"


def _fields(file: pathlib.Path) -> dict[str, type]:
    """That a file's rows need."""
    fields: dict[str, type] = dict(_FIELDS)
    if _is_classification(file.stem.removesuffix("_e")):
        fields["all_classes"] = list
    if file.stem.endswith("_e"):
        fields["length"] = int
    return fields


def _templates(file: pathlib.Path) -> dict[str, Any]:
    try:
        templates = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(templates, dict):
        raise ValueError(f"{file} holds a {type(templates).__name__}; wanted an object of prompts by task")
    return templates


def _check_template(file: pathlib.Path, name: str, template: str) -> None:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        other = sorted(fields - {"context", "input"})
        if not other:
            template.format(context="", input="")
    except ValueError as error:
        raise ValueError(f"{file}: the prompt for {name} is no template: {error}") from error
    if other:
        raise ValueError(f"{file}: the prompt for {name} has a field {{{other[0]}}}; wanted {{context}} and {{input}}")


class Room(NamedTuple):
    """For a task's prompts.

    Attributes:
        chat: whether they are put in the chat template.
        cut: tokens before that, those that the tokenizer puts first included; the middle of longer ones is cut out.
        whole: tokens after it, at most.
    """

    chat: bool
    cut: int
    whole: int


def _room(tokenizer: Any, name: str, context: int, max_length: int | None) -> Room:
    task = DATASETS[name]
    chat, whole = task.chat and tokenizer.chat_template is not None, context - task.max_new_tokens
    around = len(text.encode(tokenizer, "a", chat=chat)[0]) - len(tokens_of(tokenizer, "a"))
    first = len(first_tokens(tokenizer))
    cut = min(whole - around + first, max_length or context)
    if cut // 2 * 2 <= first:
        raise ValueError(
            f"{context=} and {max_length=} leave no room for the prompts of {name}, beside {task.max_new_tokens} "
            f"tokens of an answer and {around} around a prompt"
        )
    return Room(chat, cut, whole)


def _prompt(tokenizer: Any, prompt: str, room: Room) -> np.ndarray:
    tokens = [*first_tokens(tokenizer), *tokens_of(tokenizer, prompt)]
    length = min(len(tokens), room.cut)
    while length > 0:
        first, last = cut_middle(tokens, length)
        if last:
            prompt = "".join(tokenizer.decode(half, skip_special_tokens=True) for half in (first, last))
        encoded = text.encode(tokenizer, prompt, chat=room.chat)[0]
        if len(encoded) <= room.whole:
            return encoded
        length = length // 2 * 2 - (len(encoded) - room.whole)  # halves that meet may come to more tokens than apart
    raise ValueError(f"no part of its prompt comes to {room.whole} tokens or fewer")


def _add(found: dict[str, Example], tokenizer: Any, file: pathlib.Path, template: str, room: Room) -> list[Problem]:
    """Add a file's examples by their ids; what is left out."""
    rows, problems = read_rows(file, _fields(file))
    for line, row in rows:
        try:
            example = _example(tokenizer, file, line, row, template, room)
            if example.id in found:
                raise ValueError(f"its id is {example.id!r}, as that of a line before")
            found[example.id] = example
        except ValueError as error:
            problems.append(Problem(str(file), line, str(error)))
    return problems


def _answers(name: str, row: dict[str, Any]) -> list[str]:
    """Those that a row can be scored against; ValueError where one has another form."""
    answers = [answer for answer in row["answers"] if answer.strip()]
    if DATASETS[name].metric == "retrieval":
        for answer in answers:
            metrics.retrieval("", answer)
    return answers


def _group(file: pathlib.Path, row: dict[str, Any]) -> str:
    """The file's, and in LongBench-E its rows' length."""
    if not file.stem.endswith("_e"):
        return file.stem
    lengths = "0-4k" if row["length"] < 4000 else "4-8k" if row["length"] < 8000 else "8k+"
    return f"{file.stem} {lengths}"


def _example(tokenizer: Any, file: pathlib.Path, line: int, row: dict[str, Any], template: str, room: Room) -> Example:
    """A row's example; ValueError says what is wrong with it."""
    name = file.stem.removesuffix("_e")
    answers, classes = _answers(name, row), row.get("all_classes")
    prompt = _prompt(tokenizer, template.format(context=row["context"], input=row["input"]), room)
    line_ends = DATASETS[name].line_ends
    return Example(
        f"{file.stem}:{line if row.get('_id') is None else row['_id']}",
        prompt,
        _group(file, row),
        max_new_tokens=DATASETS[name].max_new_tokens,
        min_new_tokens=int(line_ends),
        stop=tuple(tokens_of(tokenizer, "\n")[-1:]) if line_ends else (),
        score=lambda written: score(name, written, answers, classes),
        info={"answers": answers, "tokens": len(prompt)},
    )
