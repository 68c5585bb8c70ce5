"""The command `mustafar`: text through a compressed cache, what the cache costs, its speed and its quality."""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mustafar_jax.arguments import parse_count, parse_size
from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import DENSE, text
from mustafar_jax.implementations import check_implementation
from mustafar_jax.pruning import KEY_METHODS, VALUE_METHODS

if TYPE_CHECKING:
    from mustafar_jax.generation.speed import Speed
    from mustafar_jax.models import ModelConfig
    from mustafar_jax.quality.examples import Example
    from mustafar_jax.quality.runs import Run
    from mustafar_jax.quality.tasks import Task

CONTEXTS = (1024, 4096, 16384, 65536, 131072)
"""Context lengths of `mustafar info`, as far as the model's own reaches."""

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. An error of the user's is a message on stderr, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # whoever read the text has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, NotImplementedError, OverflowError, OSError) as error:
        return _failed(options, str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        flag = "--batches" if hasattr(options, "batches") else "--batch"
        batch = max(getattr(options, "batches", [getattr(options, "batch", 1)]))
        hint = f"{flag} {batch // 2} takes less" if batch > 1 else "a shorter prompt or fewer new tokens take less"
        return _failed(options, f"the device's memory is exhausted; {hint} ({str(error).splitlines()[0]})")
    return 0


def _failed(options: argparse.Namespace, message: str) -> int:
    print(f"mustafar {options.command}: error: {message}", file=sys.stderr)
    return 1


def generate(options: argparse.Namespace) -> None:
    """Load a model, continue a prompt, and say how fast and with how large a cache."""
    from mustafar_jax.models import memory

    check_implementation(options.implementation)
    config, prompt = _compression(options), _prompt(options)
    with _progress() as progress:
        model, tokenizer = _load(options, progress)
        tokens = text.encode(tokenizer, prompt, chat=options.chat)
        prefilled = functools.partial(_report, progress, progress.add_task("prefilling", total=None))
        returned = text.Returned(
            text.stream_text(
                model,
                tokenizer,
                tokens,
                max_new_tokens=options.max_new_tokens,
                config=config,
                temperature=options.temperature,
                top_p=options.top_p,
                key=jax.random.key(options.seed),
                implementation=options.implementation,
                progress=prefilled,
            )
        )
        pieces = iter(returned)
        first = next(pieces)
    rate = _print_pieces(first, pieces, flush=options.stream)
    if returned.value.any():
        what = f"a value needed more than --v-slots {config.v_slots} and lost entries"
        print(f"mustafar generate: {what}", file=sys.stderr)
    capacity = tokens.shape[1] + options.max_new_tokens
    caches = memory.abstract_caches(model.config, config, capacity, dtype=model.dtype)
    print(_summary(rate, caches, config, model.config.head_dim), file=sys.stderr)


def _load_model(options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer, if it has one."""
    from mustafar_jax import models

    loaded = functools.partial(_report, progress, progress.add_task("loading", total=None))
    return models.load(options.model, dtype=options.dtype, progress=loaded)


def _load(options: argparse.Namespace, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    model, tokenizer = _load_model(options, progress)
    if tokenizer is None:
        raise ValueError(f"--model {options.model} holds no tokenizer, which turning text into tokens needs")
    return model, tokenizer


def info(options: argparse.Namespace) -> None:
    """Print a model's shape, what its cache costs, and how many sequences fit in a device, dense and compressed."""
    from mustafar_jax import models

    config = models.load_config(options.model)
    compression = _compression(options)
    console = Console()
    console.print(_shape_table(options.model, config))
    dtype = options.dtype or "bfloat16"
    console.print(_cost_table(config, compression, dtype))
    if options.memory is not None:
        console.print(_memory_table(config, compression, dtype, options.memory))


def bench(options: argparse.Namespace) -> None:
    """Time generations through a dense and a compressed cache, and print how they compare."""
    from mustafar_jax.generation.speed import measure

    check_implementation(options.implementation)
    compressed, sizes = _compression(options), {"context": options.context, "new_tokens": options.new_tokens}
    table = Table()
    for column in ("batch", "cache", "first token, s", "tokens/s", "of dense", "bytes", "of dense"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    try:
        with _progress() as progress:
            model = _load_model(options, progress)[0]
            title = f"{options.context} tokens of prompt, {options.new_tokens} written"
            table.title = f"{title}; {jax.devices()[0].device_kind}, {model.dtype}"
            timing = progress.add_task("timing", total=2 * len(options.batches))
            for batch in options.batches:
                found = []
                for config, name in ((DENSE, None), (compressed, options.implementation)):
                    found.append(measure(model, config, batch=batch, implementation=name, **sizes))
                    progress.advance(timing)
                for row in _speed_rows(batch, *found):
                    table.add_row(*row)
    finally:  # a batch that is too large leaves the others
        if table.rows:
            Console().print(table)


def _speed_rows(batch: int, dense: "Speed", packed: "Speed") -> list[list[str]]:
    return [
        [
            str(batch),
            name,
            f"{speed.first_token:.3f}",
            f"{speed.tokens_per_second:.1f}",
            f"{speed.tokens_per_second / dense.tokens_per_second:.2f}",
            _bytes(speed.cache_nbytes),
            f"{speed.cache_nbytes / dense.cache_nbytes:.1%}",
        ]
        for name, speed in (("dense", dense), ("compressed", packed))
    ]


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a model through a compressed cache, or continue to; print the metrics, and write them to a folder."""
    from mustafar_jax.quality.evaluate import Evaluator
    from mustafar_jax.quality.runs import Run
    from mustafar_jax.quality.tasks import TASKS

    task, config = TASKS[options.task], _compression(options)
    options.data = [task.locate(file) for file in options.data]
    _check_data(options, task)
    folder = options.output or pathlib.Path("results") / options.task / _folder_name(config)
    with _progress() as progress:
        model, tokenizer = _load(options, progress)
        examples, problems = task.examples(tokenizer, options, model.config.max_position_embeddings)
        examples = examples[: options.limit]
        for problem in problems:
            print(f"mustafar eval: {problem}; left out", file=sys.stderr)
        if not examples:
            raise ValueError("the data and options ask for no example: nothing to evaluate")
        run = Run(folder, _settings(options, task, model, config))
        evaluated = functools.partial(_report, progress, progress.add_task("evaluating", total=None))
        Evaluator(model, tokenizer, batch=options.batch).run(config, examples, run, evaluated)
    _conclude(options.task, model, config, examples, run, [str(problem) for problem in problems])


def _settings(options: argparse.Namespace, task: "Task", model: Any, config: CompressionConfig) -> dict[str, Any]:
    """What determines the records. How many of the examples there are to be does not."""
    from mustafar_jax.quality.runs import fingerprint

    return {
        "task": options.task,
        "model": _identity(options.model, model.config),
        "dtype": options.dtype,
        "data": {file.name: fingerprint(file) for file in options.data},
        "options": task.settings(options),
        "config": dataclasses.asdict(config),
    }


def _check_data(options: argparse.Namespace, task: "Task") -> None:
    if task.data and not options.data:
        raise ValueError(f"--data is missing: {options.task} needs {task.data}")
    files: dict[str, pathlib.Path] = {}
    for file in options.data:
        other = files.setdefault(file.stem, file)
        if other is not file:
            raise ValueError(f"--data names {other} and {file}: examples go by their file's name; rename one")
    for file in options.data:
        if not file.is_file():
            raise ValueError(f"--data names {file}, which is no file")


def _folder_name(config: CompressionConfig) -> str:
    """Methods and sparsities, and what else differs from what is recommended."""
    sides = [(getattr(config, f"{letter}_method"), getattr(config, f"{letter}_sparsity")) for letter in "kv"]
    methods = {"k_method": config.k_method, "v_method": config.v_method}
    usual = CompressionConfig.recommended(config.k_sparsity, config.v_sparsity, **methods)
    others = ("sink_tokens", "center_keys", "weigh_keys", "rescale_values", "residual_length", "group", "v_slots")
    changed = [f"{name}={getattr(config, name)}" for name in others if getattr(config, name) != getattr(usual, name)]
    name = "_".join([*(f"{method}-{sparsity:g}" for method, sparsity in sides), *changed])
    return re.sub(r"[^\w.=-]", "-", name)


def _identity(source: str, config: "ModelConfig") -> dict[str, str]:
    """Where a model is, as it can be found from anywhere, and a fingerprint of its description."""
    from mustafar_jax.models.gguf import read_header
    from mustafar_jax.quality.runs import digest

    path, about = pathlib.Path(source), repr(config)
    if path.is_file():
        header = read_header(path)
        about = repr((header.metadata, header.tensors))
    return {"source": str(path.resolve()) if path.exists() else source, "fingerprint": digest(about.encode())}


def _conclude(
    task: str,
    model: Any,
    config: CompressionConfig,
    examples: "Sequence[Example]",
    run: "Run",
    problems: list[str],
) -> None:
    """Print the metrics of the examples' records, and write them."""
    from mustafar_jax.quality.evaluate import ANSWERS, TOKENS, cache_bytes, summarise
    from mustafar_jax.quality.tasks import TASKS

    lengths = [
        len(example.prompt) + (example.max_new_tokens if example.gold is None else len(example.gold))
        for example in examples
    ]
    memory = cache_bytes(model, config, max(lengths))
    wanted = {example.id for example in examples}
    records = [record for record in run.records if record["id"] in wanted]
    gather = TASKS[task].gather
    shown = {"perplexity": TOKENS, "needle": ANSWERS}.get(task)
    metrics = summarise(records if gather is None else gather(records), shown)
    run.finish({"metrics": metrics, "bytes": memory, "problems": problems})
    Console().print(_metrics_table(task, metrics))
    share = memory["held"] / memory["dense"]
    print(
        f"cache of {max(lengths)} tokens: {_bytes(memory['held'])}, {share:.1%} of a bfloat16 cache; "
        f"written to {run.folder}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mustafar", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser("generate", help="continue a prompt")
    writes.set_defaults(run=generate)
    writes.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    prompt = writes.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue, or to answer with --chat")
    prompt.add_argument("--prompt-file", help="read it from this file; - for standard input")
    writes.add_argument("--chat", action="store_true", help="put the prompt in the model's chat template")
    writes.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most (%(default)s)")
    writes.add_argument("--stream", action="store_true", help="show the text as it comes")
    writes.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    writes.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest, up to this sum (%(default)s)"
    )
    writes.add_argument("--seed", type=int, default=0, help="of the random draws (%(default)s)")
    writes.add_argument("--implementation", help="of attention and packing; the best that works here unless given")
    shows = commands.add_parser("info", help="a model's shape and its cache's costs")
    shows.set_defaults(run=info)
    shows.add_argument("model", help="Hugging Face folder, .gguf file or hub id")
    shows.add_argument("--memory", type=parse_size, help="of a device, such as 80GB: how many sequences fit in it")
    times = commands.add_parser("bench", help="how fast a model writes through a dense and a compressed cache")
    times.set_defaults(run=bench)
    times.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    times.add_argument("--batches", type=parse_count, nargs="+", default=[1], help="prompts at once, each in turn (1)")
    times.add_argument("--context", type=parse_count, default=1024, help="tokens of a prompt (%(default)s)")
    times.add_argument("--new-tokens", type=parse_count, default=64, help="tokens to write (%(default)s)")
    times.add_argument("--implementation", help="with the compressed cache; the best that works here unless given")
    judges = commands.add_parser("eval", help="what a compressed cache does to a model's quality")
    judges.set_defaults(run=evaluate)
    tasks = judges.add_subparsers(dest="task", required=True)
    from mustafar_jax.quality.tasks import TASKS

    asks = [_add_task(tasks, name, task) for name, task in TASKS.items()]
    for command in asks:
        command.add_argument(
            "--dtype",
            choices=DTYPES,
            default="float32",
            help="of weights and cache (%(default)s, in which a weight takes 4 bytes)",
        )
        _add_compression(command)
    for command, default in ((writes, "the checkpoint's"), (times, "the checkpoint's"), (shows, "bfloat16")):
        command.add_argument("--dtype", choices=DTYPES, help=f"of weights and cache; {default} unless given")
        _add_compression(command)
    return parser


def _add_task(tasks: Any, name: str, task: "Task") -> argparse.ArgumentParser:
    """The command `mustafar eval NAME`."""
    command: argparse.ArgumentParser = tasks.add_parser(name, help=task.help)
    command.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    data = task.data or "not needed"
    command.add_argument("--data", type=pathlib.Path, nargs="+", default=[], metavar="FILE", help=data)
    folder = f"results/{name}/ and the methods and sparsities"
    command.add_argument("--output", type=pathlib.Path, help=f"results folder, continued; {folder} unless given")
    command.add_argument("--limit", type=parse_count, help="take the first so many examples")
    command.add_argument("--batch", type=parse_count, default=8, help="examples at once (%(default)s)")
    for flag, settings in task.options.items():
        command.add_argument(flag, **settings)
    return command


def _add_compression(command: argparse.ArgumentParser) -> None:
    command.add_argument("--k-sparsity", type=float, default=0.7, help="removed of each key; 0: dense (%(default)s)")
    command.add_argument("--v-sparsity", type=float, default=0.7, help="removed of each value; 0: dense (%(default)s)")
    for letter, what, methods in (("k", "keys", KEY_METHODS), ("v", "values", VALUE_METHODS)):
        command.add_argument(
            f"--{letter}-method",
            choices=methods,
            default="magnitude",
            help=f"rule that prunes {what} (%(default)s); with --published-rule as its paper has it",
        )
    command.add_argument("--v-slots", type=int, help="room in a packed value, where its rule keeps unequal rows")
    command.add_argument("--residual-length", type=int, default=32, help="recent tokens kept dense (%(default)s)")
    command.add_argument(
        "--published-rule",
        action="store_true",
        help="prune as the methods' papers do: without dense sink tokens, centred and weighed keys and rescaled values",
    )
    command.add_argument("--sink-tokens", type=int, help="first tokens kept dense; 4, or 0 with --published-rule")
    both = argparse.BooleanOptionalAction
    command.add_argument("--center-keys", action=both, help="prune keys by their distance from the mean key")
    command.add_argument("--weigh-keys", action=both, help="prune keys by what the prompt's last queries use as well")
    command.add_argument("--rescale-values", action=both, help="give what is kept of a value the value's norm")
    command.add_argument("--group", type=int, help="tokens pruned at once, a multiple of 32; 32 unless given")


def _compression(options: argparse.Namespace) -> CompressionConfig:
    make = CompressionConfig if options.published_rule else CompressionConfig.recommended
    names = ("sink_tokens", "center_keys", "weigh_keys", "rescale_values", "group")
    given = {name: getattr(options, name) for name in names}
    return make(
        options.k_sparsity,
        options.v_sparsity,
        k_method=options.k_method,
        v_method=options.v_method,
        v_slots=options.v_slots,
        residual_length=options.residual_length,
        **{name: value for name, value in given.items() if value is not None},
    )


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file == "-":
        return sys.stdin.read()
    try:
        with open(options.prompt_file, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {options.prompt_file} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"--prompt-file {options.prompt_file} cannot be read: {error.strerror}") from error


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    # Where it is no terminal that shows them, the bars would leave an empty line.
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _report(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


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
    # The first token comes from the prefill, and the second waits for the decode step's compilation.
    return (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None


def _summary(rate: float | None, caches: Sequence[LayerCache], config: CompressionConfig, head_dim: int) -> str:
    held, dense = (sum(getattr(cache, name) for cache in caches) for name in ("nbytes", "dense_nbytes"))
    speed = "too few tokens to time" if rate is None else f"{rate:.1f} tokens/s"
    keys, values = config.true_sparsity(head_dim)
    sparsity = f"sparsity of packed keys {keys:.4g}, of packed values {values:.4g}"
    if not config.packed_tokens(caches[0].capacity):
        sparsity = "too few tokens to pack any"
    return f"{speed} · cache {_bytes(held)}, dense {_bytes(dense)} ({held / dense:.1%}) · {sparsity}"


def _shape_table(name: str, config: "ModelConfig") -> Table:
    table = Table(title=Text(name), show_header=False)
    for field in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        table.add_row(field, str(getattr(config, field)))
    table.add_row("max_position_embeddings", str(config.max_position_embeddings))
    table.add_row("sliding_window", str(config.sliding_window))
    return table


def _cost_table(config: "ModelConfig", compression: CompressionConfig, dtype: str) -> Table:
    """Bytes of one sequence's cache, all layers, at a few context lengths."""
    from mustafar_jax.models import memory

    keys, values = compression.true_sparsity(config.head_dim)
    table = Table(title=f"KV cache of one sequence, {dtype}; true sparsity {keys:.4g} (keys), {values:.4g} (values)")
    for column in ("context", "dense", "compressed", "of dense", "dense/token", "compressed/token"):
        table.add_column(column, justify="right")
    for length in _contexts(config):
        dense, held = (
            sum(cache.nbytes for cache in memory.abstract_caches(config, how, length, dtype=dtype))
            for how in (DENSE, compression)
        )
        per_token = (_bytes(dense / length), _bytes(held / length))
        table.add_row(f"{length:,}", _bytes(dense), _bytes(held), f"{held / dense:.1%}", *per_token)
    return table


def _memory_table(config: "ModelConfig", compression: CompressionConfig, dtype: str, size: float) -> Table:
    """How many sequences fit in a device's memory, dense and compressed, at a few context lengths."""
    from mustafar_jax.models import memory

    usable, weights = memory.USABLE * size, memory.weight_nbytes(config, dtype)
    title = f"Sequences that fit in {_bytes(size)}, {memory.USABLE:.0%} of it used; weights {_bytes(weights)}, {dtype}"
    table = Table(title=title)
    for column in ("context", "dense", "compressed", "times dense", "set aside"):
        table.add_column(column, justify="right")
    for length in _contexts(config):
        dense, held = (
            memory.largest_batch(usable, config, how, capacity=length, dtype=dtype) for how in (DENSE, compression)
        )
        full = memory.plan(config, compression, batch=max(held, 1), capacity=length, dtype=dtype)
        working = _bytes(full.working + full.fragments)
        table.add_row(f"{length:,}", f"{dense:,}", f"{held:,}", f"{held / dense:.2f}" if dense else "", working)
    return table


def _contexts(config: "ModelConfig") -> list[int]:
    """Context lengths to show: those of `CONTEXTS` below the model's own, and that one."""
    longest = config.max_position_embeddings
    return [length for length in CONTEXTS if length < longest] + [longest]


def _metrics_table(task: str, metrics: dict[str, Any]) -> Table:
    table = Table(title=f"{task}: means with 95 % intervals")
    for column in ("examples", "metric", "mean", "from", "to", "n"):
        table.add_column(column, justify="left" if column in ("examples", "metric") else "right")
    for group, scores in metrics.items():
        for name, score in scores.items():
            numbers = [f"{score[part]:.4f}" for part in ("mean", "low", "high")]
            if score["n"] == 1:
                numbers[1:] = "-", "-"  # one number has no interval
            table.add_row(Text(group), name, *numbers, str(score["n"]))
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


if __name__ == "__main__":
    sys.exit(main())
