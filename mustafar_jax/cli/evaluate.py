"""`mustafar eval`: what a compressed cache does to a model's quality."""

import argparse
import pathlib
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mustafar_jax.arguments import parse_count
from mustafar_jax.cli.compression import add_compression, config_of
from mustafar_jax.cli.load import load_with_tokenizer
from mustafar_jax.cli.parser import DTYPES, add_model
from mustafar_jax.cli.render import bar, progress_bars, size, table
from mustafar_jax.quality.examples import Problem
from mustafar_jax.quality.session import Outcome, Session
from mustafar_jax.quality.tasks import TASKS, Task, option_name


def add(commands: Any) -> None:
    """Add the command, and under it one for each task."""
    command = commands.add_parser("eval", help="what a compressed cache does to a model's quality")
    command.set_defaults(run=run)
    tasks = command.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        _add_task(tasks, name, task)


def _add_task(tasks: Any, name: str, task: Task) -> None:
    """The command `mustafar eval NAME`."""
    command = tasks.add_parser(name, help=task.help)
    add_model(command)
    data = task.data or "not needed"
    command.add_argument("--data", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help=data)
    folder = f"results/{name}/ and the methods and sparsities"
    command.add_argument("--output", type=pathlib.Path, help=f"results folder, continued; {folder} unless given")
    command.add_argument("--limit", type=parse_count, help="take the first so many examples")
    command.add_argument("--batch", type=parse_count, default=8, help="examples at once (%(default)s)")
    for flag, settings in task.options.items():
        command.add_argument(flag, **settings)
    text = "of weights and cache (%(default)s, in which a weight takes 4 bytes)"
    command.add_argument("--dtype", choices=DTYPES, default="float32", help=text)
    add_compression(command)


def run(options: argparse.Namespace) -> None:
    """Evaluate a model, or continue to; print the metrics."""
    names = map(option_name, TASKS[options.task].options)
    own = {name: getattr(options, name) for name in names}
    session = Session(
        options.task,
        config_of(options),
        data=options.data,
        options=own,
        folder=options.output,
        limit=options.limit,
    )
    with progress_bars() as progress:
        model, tokenizer = load_with_tokenizer(options, progress)
        evaluated = bar(progress, "evaluating")
        settings: dict[str, Any] = {"source": options.model, "batch": options.batch}
        outcome = session.run(model, tokenizer, **settings, progress=evaluated, warn=_warn)
    Console().print(_metrics_table(options.task, outcome))
    held, share = outcome.nbytes["held"], outcome.nbytes["held"] / outcome.nbytes["dense"]
    cache = f"cache of {outcome.nbytes['capacity']} tokens: {size(held)}, {share:.1%} of a bfloat16 cache"
    print(f"{cache}; written to {outcome.folder}")


def _warn(problem: Problem) -> None:
    print(f"mustafar eval: {problem}; left out", file=sys.stderr)


def _metrics_table(task: str, outcome: Outcome) -> Table:
    title, texts = f"{task}: means with 95 % intervals", ("examples", "metric")
    shown = table(title, (*texts, "mean", "from", "to", "n"), texts)
    for group, scores in outcome.metrics.items():
        for name, score in scores.items():
            numbers = [f"{score[part]:.4f}" for part in ("mean", "low", "high")]
            if score["n"] == 1:
                numbers[1:] = "-", "-"  # one number has no interval
            shown.add_row(Text(group), name, *numbers, str(score["n"]))
    return shown
