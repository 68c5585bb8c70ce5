"""The evaluations by name, as `mustafar eval` takes them."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mustafar_jax.arguments import parse_count, parse_seed
from mustafar_jax.quality import choice, longbench, needle, perplexity, ruler
from mustafar_jax.quality.evaluate import ANSWERS, TOKENS
from mustafar_jax.quality.examples import Example, Problem
from mustafar_jax.quality.runs import Record, fingerprint

Examples = tuple[list[Example], list[Problem]]


@dataclasses.dataclass(frozen=True)
class Task:
    """An evaluation.

    Attributes:
        help: what it is, in a line.
        data: what its data files hold; "" where none is needed.
        examples: tokenizer, data files, the model's context in tokens, and its own options as keyword arguments ->
            examples, and what is wrong with the data.
        options: flags of its own, with the keyword arguments of `add_argument`; they are part of a run's settings.
        gather: records -> those that metrics are made of; if None, the examples' own.
        locate: what is named as a data file -> the file that is meant.
        shown: the scores that its metrics are made of; all that its records have if None.
    """

    help: str
    data: str
    examples: Callable[..., Examples]
    options: Mapping[str, Mapping[str, Any]]
    gather: Callable[[Sequence[Record]], list[Record]] | None = None
    locate: Callable[[pathlib.Path], pathlib.Path] = pathlib.Path
    shown: Sequence[str] | None = None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its own options by the names of `examples`' keyword arguments: those given, and the defaults of the others.

        Raises:
            TypeError: a name that is none of its options.
            ValueError: an option that must be given is missing.
        """
        known = {option_name(flag): settings for flag, settings in self.options.items()}
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(f"options names {unknown}; wanted names out of {sorted(known)}")
        for name, settings in known.items():
            if settings.get("required") and given.get(name) is None:
                raise ValueError(f"options has no {name!r}: {settings['help']}")
        return {name: given.get(name, settings.get("default")) for name, settings in known.items()}

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """By its own flags, the values of all its options; of files, what is in them."""
        return {flag: _setting(options[option_name(flag)]) for flag in self.options}


def option_name(flag: str) -> str:
    """A flag's keyword argument, as argparse makes it."""
    return flag.removeprefix("--").replace("-", "_")


def _setting(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_setting(each) for each in value]
    return {value.name: fingerprint(value)} if isinstance(value, pathlib.Path) else value


def _perplexity(tokenizer: Any, data: Sequence[pathlib.Path], context: int, **sizes: int) -> Examples:
    return perplexity.examples(tokenizer, data, **sizes), []


def _needle(tokenizer: Any, data: Sequence[pathlib.Path], context: int, **where: Any) -> Examples:
    hidden = [example for file in data for example in _named(file, needle.needles(tokenizer, file, **where))]
    return hidden + needle.passkeys(tokenizer, **where), []


def _named(file: pathlib.Path, examples: list[Example]) -> list[Example]:
    return [dataclasses.replace(example, id=f"{file.stem}:{example.id}") for example in examples]


def _ruler(tokenizer: Any, data: Sequence[pathlib.Path], context: int, **asked: Any) -> Examples:
    if len(data) != 1:
        raise ValueError(f"data names {len(data)} files; RULER's tasks want one text")
    return ruler.examples(tokenizer, data[0], **asked)


def _longbench(
    tokenizer: Any, data: Sequence[pathlib.Path], context: int, *, prompts: pathlib.Path, max_length: int | None
) -> Examples:
    return longbench.examples(tokenizer, data, prompts, context=context, max_length=max_length)


def _choice(tokenizer: Any, data: Sequence[pathlib.Path], context: int) -> Examples:
    return choice.examples(tokenizer, data, context=context)


def _lengths(what: str) -> dict[str, Any]:
    return {"type": parse_count, "nargs": "+", "default": [1024, 2048, 4096], "help": f"tokens of {what} (%(default)s)"}


_SEED = {"type": parse_seed, "default": 0, "help": "of what is made at random (%(default)s)"}

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
        shown=TOKENS,
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
        shown=ANSWERS,
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
