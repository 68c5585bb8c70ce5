"""`mustafar generate`: text through a compressed cache."""

import argparse
import pathlib
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np

from mustafar_jax import generation
from mustafar_jax.backends.registry import check_implementation
from mustafar_jax.cli import hosts
from mustafar_jax.cli.compression import add_compression, config_of, packed_rows
from mustafar_jax.cli.load import open_on_mesh
from mustafar_jax.cli.parser import add_dtype, add_implementation, add_mesh, add_model
from mustafar_jax.cli.render import bar, progress_bars, size
from mustafar_jax.cli.sampling import add_sampling, sampling_of
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import text
from mustafar_jax.generation.checks import not_finite

HEADING = 60
"""Characters of a prompt that the line above its answer shows."""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("generate", help="continue a prompt, or several as one batch")
    command.set_defaults(run=run)
    add_model(command)
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        help="the text to continue, or to answer with --chat; given again: another, in the same batch",
    )
    prompt.add_argument("--prompt-file", help="read it from this file; - for standard input")
    command.add_argument("--chat", action="store_true", help="put the prompt in the model's chat template")
    command.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most (%(default)s)")
    command.add_argument("--stream", action="store_true", help="show the text of a single prompt as it comes")
    add_sampling(command)
    add_implementation(command, "of attention and packing")
    add_dtype(command, "the checkpoint's")
    add_mesh(command)
    hosts.add_hosts(command)
    add_compression(command)


def run(options: argparse.Namespace) -> None:
    """Load a model, continue the prompts, and say how fast and with how large a cache."""
    hosts.join(options)
    check_implementation(options.implementation)
    config, sampling, prompts = config_of(options), sampling_of(options), _prompts(options)
    checkpoint, tokenizer, mesh = open_on_mesh(options, config, len(prompts))
    tokens, lengths = _batch([text.encode(tokenizer, prompt, chat=options.chat)[0] for prompt in prompts])
    with progress_bars() as progress:
        model = checkpoint.load_model(mesh=mesh, progress=bar(progress, "loading"))
        settings: dict[str, Any] = {
            "config": config,
            "max_new_tokens": options.max_new_tokens,
            "padding": False,
        } | sampling
        settings |= {"implementation": options.implementation, "progress": bar(progress, "prefilling")}
        steps = text.Returned(_stream(model, tokenizer, tokens, lengths, settings))
        coming = iter(steps)
        first = next(coming)
    if len(prompts) == 1:
        rate = _print_pieces(first, coming, flush=options.stream)
    else:
        times = [time.perf_counter(), *(time.perf_counter() for _ in coming)]
        rate = _print_answers(prompts, tokenizer, steps.value, times)
    end = steps.value
    _tell_of_overflow(np.asarray(end.overflow), config)
    summary = _summary(rate, model, config, len(prompts), tokens.shape[1] + options.max_new_tokens)
    print(summary + _cut(model, end, options.max_new_tokens), file=sys.stderr)
    _check_finite(model, end)


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is None:
        return [_read(options.prompt_file)]
    if options.stream and len(options.prompt) > 1:
        raise ValueError(f"--stream shows the text of one --prompt as it comes; got {len(options.prompt)}")
    return list(options.prompt)


def _read(file: str) -> str:
    if file == "-":
        return sys.stdin.read()
    try:
        return pathlib.Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"--prompt-file {file} cannot be read: {error.strerror}") from error


def _batch(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [S] of several lengths -> int32 [B, S], padded on the right, and their lengths, int32 [B]."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _stream(
    model: Any, tokenizer: Any, tokens: np.ndarray, lengths: np.ndarray, settings: dict[str, Any]
) -> Generator[Any, None, generation.Generation]:
    """Of one prompt the pieces of its text, of several each step's tokens, int32 [B]; returns the generation."""
    if len(tokens) == 1:
        return text.stream_text(model, tokenizer, tokens, **settings)
    return generation.stream(model, tokens, lengths=lengths, eos_id=model.config.eos_ids or None, **settings)


def _print_pieces(first: str, pieces: Iterable[str], *, flush: bool) -> float | None:
    """Print the text, as it comes or all at once; tokens per second, None where there are too few to tell."""
    written, times = [first], [time.perf_counter()]
    if flush:
        print(first, end="", flush=True)
    for piece in pieces:
        written.append(piece)
        times.append(time.perf_counter())
        if flush:
            print(piece, end="", flush=True)
    print("" if flush else "".join(written))
    return _rate([len(times)], times)


def _print_answers(
    prompts: Sequence[str], tokenizer: Any, end: generation.Generation, times: Sequence[float]
) -> float | None:
    """Print each prompt's answer under a line that names the prompt; tokens per second of all, or None."""
    tokens, lengths = np.asarray(end.tokens), np.asarray(end.lengths)
    for number, (prompt, row, length) in enumerate(zip(prompts, tokens, lengths, strict=True), start=1):
        print(f"--- {number}: {_shortened(prompt)} ---")
        print(tokenizer.decode(row[:length], skip_special_tokens=True))
    return _rate(lengths.tolist(), times)


def _rate(counts: Iterable[int], times: Sequence[float]) -> float | None:
    """Tokens per second of sequences of so many tokens, which came at these times; None where there are too few."""
    # The first token comes from the prefill, and the second waits for the decode step's compilation.
    return sum(max(count - 2, 0) for count in counts) / (times[-1] - times[1]) if len(times) > 2 else None


def _shortened(prompt: str) -> str:
    """The beginning of a prompt, on one line."""
    line = " ".join(prompt.split())
    return line if len(line) <= HEADING else line[: HEADING - 1] + "…"


def _tell_of_overflow(overflow: np.ndarray, config: CompressionConfig) -> None:
    """Say on stderr which of the sequences, bool [B], lost entries."""
    for number in np.flatnonzero(overflow) + 1:
        whose = f" of prompt {number}" if len(overflow) > 1 else ""
        what = f"a value{whose} needed more than --v-slots {config.v_slots} and lost entries"
        print(f"mustafar generate: {what}", file=sys.stderr)


def _check_finite(model: Any, end: generation.Generation) -> None:
    """Raise ValueError for prompts whose answers ended since there were no logits to go on from."""
    lengths = np.asarray(end.lengths)
    if broken := {f"prompt {row + 1}": lengths[row] + 1 for row in np.flatnonzero(~np.asarray(end.finite))}:
        raise ValueError(not_finite(model, broken))


def _cut(model: Any, end: generation.Generation, most: int) -> str:
    """Of a summary: how many answers ended for want of room, if any."""
    tokens, lengths = np.asarray(end.tokens), np.asarray(end.lengths)
    last = tokens[np.arange(len(tokens)), np.maximum(lengths, 1) - 1]
    cut = int(((lengths == most) & ~np.isin(last, model.config.eos_ids or ())).sum())
    of_several = f"{cut} of {len(tokens)} answers " if len(tokens) > 1 else ""
    return f" · {of_several}cut at --max-new-tokens {most}" if cut else ""


def _summary(rate: float | None, model: Any, config: CompressionConfig, batch: int, capacity: int) -> str:
    """What the generation took, in a line: its speed, its caches' bytes, the sparsity of what was packed."""
    from mustafar_jax.models import memory

    caches = memory.abstract_caches(model.config, config, capacity, batch=batch, dtype=model.dtype)
    held, dense = (sum(getattr(cache, name) for cache in caches) for name in ("nbytes", "dense_nbytes"))
    speed = "too few tokens to time" if rate is None else f"{rate:.1f} tokens/s"
    packed = packed_rows(config, model.config.head_dim, model.dtype)
    if not config.packed_tokens(capacity):
        packed = "too few tokens to pack any"
    return f"{speed} · cache {size(held)}, dense {size(dense)} ({held / dense:.1%}) · {packed}"
