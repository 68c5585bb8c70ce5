"""The evaluations by name, as `mustafar eval` takes them."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mustafar_jax.arguments import parse_count
from mustafar_jax.quality import choice, longbench, needle, perplexity, ruler
from mustafar_jax.quality.examples import Example, Problem
from mustafar_jax.quality.runs import Record, fingerprint

Examples = tuple[list[Example], list[Problem]]


@dataclasses.dataclass(frozen=True)
class Task:
    """An evaluation.

    Attributes:
        help: what it is, in a line.
        data: what the files of --data hold; "" where none is needed.
        examples: tokenizer, options, the model's context in tokens -> examples, and what is wrong with the data.
        options: flags of its own, with the keyword arguments of `add_argument`; they are part of a run's settings.
        gather: records -> those that metrics are made of; if None, the examples' own.
        locate: what --data names -> the file that is meant.
    """

    help: str
    data: str
    examples: Callable[[Any, argparse.Namespace, int], Examples]
    options: Mapping[str, Mapping[str, Any]]
    gather: Callable[[Sequence[Record]], list[Record]] | None = None
    locate: Callable[[pathlib.Path], pathlib.Path] = pathlib.Path

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """The values of its own flags; of files, what is in them."""
        given = {flag: getattr(options, flag.removeprefix("--").replace("-", "_")) for flag in self.options}
        return {flag: _setting(value) for flag, value in given.items()}


def _setting(value: Any) -> Any:
    if isinstance(value, list):
        return [_setting(each) for each in value]
    return {value.name: fingerprint(value)} if isinstance(value, pathlib.Path) else value


def _perplexity(tokenizer: Any, options: argparse.Namespace, context: int) -> Examples:
    sizes = {name: getattr(options, name) for name in ("windows", "prompt", "continuation")}
    return perplexity.examples(tokenizer, options.data, **sizes), []


def _needle(tokenizer: Any, options: argparse.Namespace, context: int) -> Examples:
    where = {name: getattr(options, name) for name in ("lengths", "depths", "repeats", "seed")}
    hidden = [example for file in options.data for example in _named(file, needle.needles(tokenizer, file, **where))]
    return hidden + needle.passkeys(tokenizer, **where), []


def _named(file: pathlib.Path, examples: list[Example]) -> list[Example]:
    return [dataclasses.replace(example, id=f"{file.stem}:{example.id}") for example in examples]


def _ruler(tokenizer: Any, options: argparse.Namespace, context: int) -> Examples:
    if len(options.data) != 1:
        raise ValueError(f"--data names {len(options.data)} files; RULER's tasks want one text")
    names = {name: getattr(options, name) for name in ("tasks", "questions", "lengths", "samples", "seed")}
    return ruler.examples(tokenizer, options.data[0], **names)


def _longbench(tokenizer: Any, options: argparse.Namespace, context: int) -> Examples:
    return longbench.examples(tokenizer, options.data, options.prompts, context=context, max_length=options.max_length)


def _choice(tokenizer: Any, options: argparse.Namespace, context: int) -> Examples:
    return choice.examples(tokenizer, options.data, context=context)


def _lengths(what: str) -> dict[str, Any]:
    return {"type": parse_count, "nargs": "+", "default": [1024, 2048, 4096], "help": f"tokens of {what} (%(default)s)"}


_SEED = {"type": int, "default": 0, "help": "of what is made at random (%(default)s)"}

TASKS = {
    "perplexity": Task(
        "loss and KL divergence from dense on texts, after a long prompt",
        "text files",
        _perplexity,
        {
            "--windows": {"type": parse_count, "default": 8, "help": "of each text (%(default)s)"},
            "--prompt": {"type": parse_count, "default": 1536, "help": "tokens prefilled (%(default)s)"},
            "--continuation": {"type": parse_count, "default": 512, "help": "tokens scored (%(default)s)"},
        },
    ),
    "needle": Task(
        "a number hidden in a text, and the passkey",
        "text files for haystacks",
        _needle,
        {
            "--lengths": _lengths("the prompts, the answer not included"),
            "--depths": {"type": parse_count, "default": 10, "help": "places from beginning to end (%(default)s)"},
            "--repeats": {"type": parse_count, "default": 1, "help": "examples at each length and place (%(default)s)"},
            "--seed": _SEED,
        },
    ),
    "ruler": Task(
        "RULER's synthetic tasks",
        "one text file, which hides needles; repeated where it is short",
        _ruler,
        {
            "--tasks": {
                "nargs": "+",
                "choices": list(ruler.TASKS),
                "default": [],
                "metavar": "TASK",
                "help": f"all that there are files for, unless given: {', '.join(ruler.TASKS)}",
            },
            "--questions": {
                "type": pathlib.Path,
                "nargs": "+",
                "default": [],
                "metavar": "FILE",
                "help": "jsonl files of qa_1 and qa_2: question, answers, documents",
            },
            "--lengths": _lengths("prompt and answer together"),
            "--samples": {"type": parse_count, "default": 10, "help": "of each task at each length (%(default)s)"},
            "--seed": _SEED,
        },
    ),
    "longbench": Task(
        "LongBench's tasks, with its prompts and scores",
        "LongBench's jsonl files, or names of its tasks, whose files then come from the hub",
        _longbench,
        {
            "--prompts": {
                "type": pathlib.Path,
                "required": True,
                "metavar": "FILE",
                "help": "LongBench's config/dataset2prompt.json",
            },
            "--max-length": {
                "type": int,
                "help": "tokens; the middle of longer prompts is cut out. What the context has room for unless given",
            },
        },
        locate=longbench.locate,
    ),
    "choice": Task(
        "multiple choice by likelihood",
        "jsonl files: context, question, choices, answer (the index of the right choice)",
        _choice,
        {},
        gather=choice.accuracy,
    ),
}
