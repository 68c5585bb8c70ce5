"""The parser of the command line, and the arguments that several commands take."""

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from mustafar_jax.backends.registry import BACKENDS
from mustafar_jax.sharding import parse_mesh

DTYPES = ("bfloat16", "float16", "float32")

MODEL = "Hugging Face folder, .gguf file or hub id"
"""What names a model."""


def _note(action: argparse.Action, namespace: argparse.Namespace, option: str | None) -> None:
    """Remember that an option was given; ArgumentError where it had been."""
    if option is None:  # a positional argument, which cannot come again
        return
    given = vars(namespace).setdefault("given", set())
    if action.dest in given:
        raise argparse.ArgumentError(action, "given more than once")
    given.add(action.dest)


class _Once(argparse.Action):
    """Stores the value, or `const` of an option that takes none."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _note(self, namespace, option_string)
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


class _OnceEither(argparse.BooleanOptionalAction):
    """Stores True for --option, False for --no-option."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        _note(self, namespace, option_string)
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """Takes an option once: of one that comes again, argparse would drop the earlier values in silence.

    Options that are to come several times have the action "append".
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.register("action", "store_true", functools.partial(_Once, nargs=0, const=True, default=False))
        self.register("action", argparse.BooleanOptionalAction, _OnceEither)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in two lines: the usage of all options would take twenty."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists the options\n")

    def format_help(self) -> str:
        """The usage names what must be given; the groups of options follow."""
        if self._subparsers is None:
            self.usage = " ".join(["%(prog)s", *self._required(), "[options]"])
        return super().format_help()

    def _required(self) -> Iterator[str]:
        """What must be given; of options of which one must be, the first."""
        one_of = [group._group_actions[0] for group in self._mutually_exclusive_groups if group.required]
        for action in self._actions:
            value = action.metavar or action.dest.upper()
            if not action.option_strings:
                yield f"{{{','.join(map(str, action.choices))}}}" if action.choices else str(value)
            elif action.required or action in one_of:
                yield f"{action.option_strings[0]} {value}"


def add_implementation(command: argparse.ArgumentParser, of: str) -> None:
    """Which backend computes something."""
    names = ", ".join(BACKENDS)
    command.add_argument("--implementation", help=f"{of}: {names}; the best that works here unless given")


def add_model(command: argparse.ArgumentParser) -> None:
    """The model, which must be given."""
    command.add_argument("--model", required=True, help=MODEL)


def add_dtype(command: argparse.ArgumentParser, unless_given: str) -> None:
    """What weights and cache are held in; None unless given, which means what `unless_given` says."""
    command.add_argument("--dtype", choices=DTYPES, help=f"of weights and cache; {unless_given} unless given")


def add_mesh(command: argparse.ArgumentParser) -> None:
    """The devices that the model and its caches are spread over."""
    command.add_argument(
        "--mesh",
        type=_mesh,
        metavar="data=2,tensor=4",
        help="spread weights and caches over devices: sequences over data, heads over tensor, tokens over context",
    )


def _mesh(text: str) -> dict[str, int]:
    try:
        return parse_mesh(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
