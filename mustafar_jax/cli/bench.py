"""`mustafar bench`: how fast a model writes through a dense and a compressed cache."""

import argparse
from typing import Any

import jax
from rich.console import Console

from mustafar_jax.arguments import parse_count
from mustafar_jax.backends.registry import check_implementation
from mustafar_jax.cli.compression import add_compression, config_of
from mustafar_jax.cli.interrupt import before_leaving
from mustafar_jax.cli.load import load_model
from mustafar_jax.cli.parser import add_dtype, add_implementation, add_model
from mustafar_jax.cli.render import progress_bars, size, table
from mustafar_jax.generation import DENSE
from mustafar_jax.generation.speed import Speed, measure


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("bench", help="how fast a model writes through a dense and a compressed cache")
    command.set_defaults(run=run)
    add_model(command)
    command.add_argument(
        "--batches", type=parse_count, nargs="+", default=[1], help="prompts at once, each in turn (1)"
    )
    command.add_argument("--context", type=parse_count, default=1024, help="tokens of a prompt (%(default)s)")
    command.add_argument("--new-tokens", type=parse_count, default=64, help="tokens to write (%(default)s)")
    add_implementation(command, "of the compressed cache")
    add_dtype(command, "the checkpoint's")
    add_compression(command)


def run(options: argparse.Namespace) -> None:
    """Time generations of random prompts, and print how they compare."""
    check_implementation(options.implementation)
    compressed = config_of(options)
    sizes = {"context": options.context, "new_tokens": options.new_tokens}
    shown = table("", ("batch", "cache", "first token, s", "tokens/s", "of dense", "bytes", "of dense"), ("cache",))

    def show() -> None:
        if shown.rows:
            Console().print(shown)

    before_leaving(show)
    try:
        with progress_bars() as progress:
            model = load_model(options, progress)[0]
            title = f"{options.context} tokens of prompt, {options.new_tokens} written"
            shown.title = f"{title}; {jax.devices()[0].device_kind}, {model.dtype}"
            timing = progress.add_task("timing", total=2 * len(options.batches))
            for batch in options.batches:
                found = []
                for config, name in ((DENSE, None), (compressed, options.implementation)):
                    found.append(measure(model, config, batch=batch, implementation=name, **sizes))
                    progress.advance(timing)
                for row in _rows(batch, *found):
                    shown.add_row(*row)
    finally:  # a batch that is too large leaves the others
        show()


def _rows(batch: int, dense: Speed, packed: Speed) -> list[list[str]]:
    return [
        [
            str(batch),
            name,
            f"{speed.first_token:.3f}",
            f"{speed.tokens_per_second:.1f}",
            f"{speed.tokens_per_second / dense.tokens_per_second:.2f}",
            size(speed.cache_nbytes),
            f"{speed.cache_nbytes / dense.cache_nbytes:.1%}",
        ]
        for name, speed in (("dense", dense), ("compressed", packed))
    ]
