"""The evaluations by name, as `mustafar eval` takes them."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mustafar_jax.quality import needle, perplexity
from mustafar_jax.quality.examples import Example, Problem

Examples = tuple[list[Example], list[Problem]]


@dataclasses.dataclass(frozen=True)
class Task:
    """An evaluation.

    Attributes:
        help: what it is, in a line.
        data: what the files of --data hold; "" where none is needed.
        examples: tokenizer, options -> examples, and what is wrong with the data.
        options: flags of its own, with the keyword arguments of `add_argument`; they are part of a run's settings.
    """

    help: str
    data: str
    examples: Callable[[Any, argparse.Namespace], Examples]
    options: Mapping[str, Mapping[str, Any]]

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """The values of its own flags."""
        return {flag: getattr(options, flag.removeprefix("--").replace("-", "_")) for flag in self.options}


def _perplexity(tokenizer: Any, options: argparse.Namespace) -> Examples:
    sizes = {name: getattr(options, name) for name in ("windows", "prompt", "continuation")}
    return perplexity.examples(tokenizer, options.data, **sizes), []


def _needle(tokenizer: Any, options: argparse.Namespace) -> Examples:
    where = {name: getattr(options, name) for name in ("lengths", "depths", "repeats", "seed")}
    hidden = [example for file in options.data for example in _named(file, needle.needles(tokenizer, file, **where))]
    return hidden + needle.passkeys(tokenizer, **where), []


def _named(file: pathlib.Path, examples: list[Example]) -> list[Example]:
    return [dataclasses.replace(example, id=f"{file.stem}:{example.id}") for example in examples]


_LENGTHS = {"type": int, "nargs": "+", "default": [1024, 2048, 4096], "help": "tokens of the prompts (%(default)s)"}
_SEED = {"type": int, "default": 0, "help": "of what is made at random (%(default)s)"}

TASKS = {
    "perplexity": Task(
        "loss and KL divergence from dense on texts, after a long prompt",
        "text files",
        _perplexity,
        {
            "--windows": {"type": int, "default": 8, "help": "of each text (%(default)s)"},
            "--prompt": {"type": int, "default": 1536, "help": "tokens prefilled (%(default)s)"},
            "--continuation": {"type": int, "default": 512, "help": "tokens scored (%(default)s)"},
        },
    ),
    "needle": Task(
        "a number hidden in a text, and the passkey",
        "text files for haystacks",
        _needle,
        {
            "--lengths": _LENGTHS,
            "--depths": {"type": int, "default": 10, "help": "places from beginning to end (%(default)s)"},
            "--repeats": {"type": int, "default": 1, "help": "examples at each length and place (%(default)s)"},
            "--seed": _SEED,
        },
    ),
}
