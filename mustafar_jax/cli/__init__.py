"""The command `mustafar`: text through a compressed cache, what the cache costs, its speed and its quality."""

import argparse
import os
import sys
from collections.abc import Sequence

import jax

import mustafar_jax
from mustafar_jax.cli import bench, chat, doctor, evaluate, generate, info, interrupt
from mustafar_jax.cli.parser import Parser


def command() -> int:
    """`main` as a process of its own, which Ctrl-C ends at once."""
    return interrupt.run(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. An error of the user's is a message on stderr, without a traceback."""
    options = make_parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # whoever read the text has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return interrupt.STATUS
    except (ValueError, TypeError, NotImplementedError, OverflowError, OSError) as error:
        return _failed(options, str(error))
    except MemoryError as error:
        return _failed(options, f"the host's memory is exhausted; {_smaller(options)} ({error})")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        hint = f"the device's memory is exhausted; {_smaller(options)} ({str(error).splitlines()[0]})"
        return _failed(options, hint)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it makes carries the command out."""
    parser = Parser(prog="mustafar", description=__doc__)
    version = f"mustafar_jax {mustafar_jax.__version__}, jax {jax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (generate, chat, info, bench, evaluate, doctor):
        command.add(commands)
    return parser


def _failed(options: argparse.Namespace, message: str) -> int:
    print(f"mustafar {options.command}: error: {message}", file=sys.stderr)
    return 1


def _smaller(options: argparse.Namespace) -> str:
    """What takes less memory."""
    if options.command == "chat":
        return "a smaller --capacity takes less"
    flag = "--batches" if hasattr(options, "batches") else "--batch"
    batch = max(getattr(options, "batches", [getattr(options, "batch", 1)]))
    if batch > 1:
        return f"{flag} {batch // 2} takes less"
    if len(getattr(options, "prompt", None) or []) > 1:
        return "fewer prompts take less"
    return "a shorter prompt or fewer new tokens take less"
