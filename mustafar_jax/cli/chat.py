"""`mustafar chat`: a conversation in the terminal, through a compressed cache."""

import argparse
import sys
import time
from typing import Any

from mustafar_jax.backends.registry import check_implementation
from mustafar_jax.cli import interrupt
from mustafar_jax.cli.compression import add_compression, config_of
from mustafar_jax.cli.load import open_on_mesh
from mustafar_jax.cli.parser import add_dtype, add_implementation, add_mesh, add_model
from mustafar_jax.cli.render import bar, progress_bars, size
from mustafar_jax.cli.sampling import add_sampling, sampling_of
from mustafar_jax.generation import Conversation
from mustafar_jax.generation.conversation import CAPACITY
from mustafar_jax.generation.messages import check_template
from mustafar_jax.generation.text import finish

ASK = "> "
"""What stands before the user's lines in a terminal."""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "chat",
        help="a conversation: one line a turn",
        description="A conversation, one line a turn. Ctrl-C ends an answer, or the command between answers; Ctrl-D "
        "ends it, too.",
    )
    command.set_defaults(run=run)
    add_model(command)
    command.add_argument("--system", help="what the model is told before the first turn")
    command.add_argument("--capacity", type=int, help=f"tokens that the cache has room for, all turns ({CAPACITY})")
    command.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer at most (%(default)s)")
    command.add_argument("--stop", action="append", help="a text that ends an answer; given again: another")
    add_sampling(command)
    add_implementation(command, "of attention and packing")
    add_dtype(command, "the checkpoint's")
    add_mesh(command)
    add_compression(command)


def run(options: argparse.Namespace) -> None:
    """Load a model, and answer lines until there are no more."""
    check_implementation(options.implementation)
    config, sampling = config_of(options), sampling_of(options)
    checkpoint, tokenizer, mesh = open_on_mesh(options, config, 1)
    check_template(tokenizer)
    with progress_bars() as progress:
        model = checkpoint.load_model(mesh=mesh, progress=bar(progress, "loading"))
    conversation = Conversation(
        model,
        tokenizer,
        [] if options.system is None else [{"role": "system", "content": options.system}],
        config=config,
        capacity=options.capacity,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop or (),
        implementation=options.implementation,
        **sampling,
    )
    while (line := _line()) is not None:
        if line.strip():
            _answer(conversation, line)


def _line() -> str | None:
    """What the user says next; None at the end."""
    try:
        return input(ASK if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(conversation: Conversation, line: str) -> None:
    """Show an answer as it comes, until an interrupt, and what it took."""
    with interrupt.listening() as interrupted:
        pieces, times = conversation.stream(line), []
        for piece in pieces:
            times.append(time.perf_counter())
            print(piece, end="", flush=True)
            if interrupted.is_set():
                rest, _ = finish(pieces)
                print("".join(rest), end="")
                break
    print(flush=True)
    print(_summary(conversation, times), file=sys.stderr)


def _summary(conversation: Conversation, times: list[float]) -> str:
    """The speed of an answer whose tokens came at these times, and what the cache holds."""
    # The first token comes from the prompt, and the first step of the first turn is compiled.
    speed = f"{(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else "too few tokens to time"
    held, dense, tokens = conversation.nbytes, conversation.dense_nbytes, conversation.num_tokens
    room = f"{tokens} of {conversation.capacity} tokens"
    return f"{speed} · {room} · cache {size(held)}, dense {size(dense)} ({held / dense:.1%})"
