"""Every pruning rule, or every format of rows, beside its neighbours, on the same windows and needles of one model.

    python -m benchmarks.quality_sweep --model MODEL --data FILE [FILE ...] --output FOLDER

For each cache of a list in `quality_caches`, the perplexity and the needle test of `mustafar eval`: 16 windows of
1,536 + 512 tokens of each text, and needles in the first text at 1,024, 2,048 and 4,096 tokens; where asked, RULER's
tasks at these lengths. A folder per cache and test holds the records: a sweep that was interrupted goes on where it
stopped, and several may share the work (--part 0/4 .. 3/4). With --collect, what is there is put into a JSON file, from
which `python -m benchmarks.quality_report` makes the tables.
"""

import argparse
import functools
import json
import pathlib
import re
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

import mustafar_jax as mj
from benchmarks.origin import where
from benchmarks.quality_caches import CACHES, Cache, caches
from mustafar_jax.quality import needle, perplexity, ruler
from mustafar_jax.quality.evaluate import Evaluator, cache_bytes
from mustafar_jax.quality.examples import Example
from mustafar_jax.quality.quantised import Quantised
from mustafar_jax.quality.runs import Run, fingerprint

TESTS = ["perplexity", "needle", "ruler"]


def main() -> None:
    """Measure, or collect what was measured."""
    options = _parser().parse_args()
    if options.collect:
        write(options.collect, collect(options.output))
        return
    model, tokenizer = mj.models.load(options.model, dtype=options.dtype)
    tests = _tests(tokenizer, options)
    settings = {
        "model": pathlib.Path(options.model).name,
        "dtype": options.dtype,
        "data": {file.name: fingerprint(file) for file in options.data},
        "where": where(),
    }
    part, parts = map(int, options.part.split("/"))
    listed = CACHES[options.caches]()
    chosen = [cache for cache in listed if re.search(options.only, cache.name)][part::parts]
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, examples in tests.items():
            shown = progress.add_task(name, total=len(examples))
            runs = [(cache.config, _run(cache, name, examples, options.output, settings)) for cache in chosen]
            longest = max(len(example.prompt) for example in examples)
            evaluator = Evaluator(model, tokenizer, batch=options.batch, padding=options.padding or longest)
            evaluator.run_together(runs, examples, functools.partial(_show, progress, shown))
            for cache, (_, run) in zip(chosen, runs, strict=True):
                run.finish(_about(cache) | _metrics(model, cache, examples))


def _show(progress: Progress, task: TaskID, done: float, total: int) -> None:
    progress.update(task, completed=done)


def _run(cache: Cache, test: str, examples: list[Example], output: pathlib.Path, settings: Any) -> Run:
    ids = {"examples": [example.id for example in examples]}
    return Run(output / cache.name / test, settings | _about(cache) | ids)


def _about(cache: Cache) -> dict[str, Any]:
    return {"rule": cache.rule, "pruned": cache.pruned, "kind": repr(cache.config)}


def _metrics(model: Any, cache: Cache, examples: list[Example]) -> dict[str, Any]:
    """What holds for all of a test's examples."""
    config = None if isinstance(cache.config, Quantised) else cache.config
    longest = max(len(example.prompt) + example.after for example in examples)
    return {
        "sparsity": None if config is None else [config.k_sparsity, config.v_sparsity],
        "true_sparsity": None if config is None else config.true_sparsity(model.config.head_dim),
        "bits": cache.config.entry_bits(model.config.head_dim),
        "bytes": cache_bytes(model, cache.config, longest),
    }


def _tests(tokenizer: Any, options: argparse.Namespace) -> dict[str, list[Example]]:
    """The examples of each test."""
    sizes = {name: getattr(options, name) for name in ("windows", "prompt", "continuation")}
    where_to = {name: getattr(options, name) for name in ("lengths", "depths")}

    def make(test: str) -> list[Example]:
        if test == "perplexity":
            return perplexity.examples(tokenizer, options.data, **sizes)
        if test == "ruler":
            lengths, samples = options.lengths, options.samples
            return ruler.examples(tokenizer, options.data[0], lengths=lengths, samples=samples)[0]
        return needle.needles(tokenizer, options.data[0], **where_to) + needle.passkeys(tokenizer, **where_to)

    return {test: make(test) for test in options.tests}


def collect(folder: pathlib.Path) -> dict[str, Any]:
    """What was measured: settings once, and for each cache and test its bytes and each example's scores.

    Of each test, the examples that all of its caches have records of. Raises ValueError for a folder without any.
    """
    finished = [(file.parent, *_read(file.parent)) for file in sorted(folder.glob("*/*/metrics.json"))]
    if not finished:
        raise ValueError(f"{folder} holds no finished test of any cache")
    _, settings, _, _ = finished[0]
    order = {cache.name: index for index, cache in enumerate(caches())}
    tests: dict[str, list[str]] = {}
    for run, settings, _, records in finished:
        ids = tests.setdefault(run.name, settings["examples"])
        tests[run.name] = [id_ for id_ in ids if id_ in records]
    rows: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[str]] = {}
    for run, _, found, records in sorted(finished, key=lambda each: order.get(each[0].parent.name, len(order))):
        shown = ("rule", "pruned", "kind", "sparsity", "true_sparsity", "bits")
        about = {name: found[name] for name in shown if name in found}  # earlier ones have no bits
        row = rows.setdefault(run.parent.name, {"name": run.parent.name} | about | {"tests": {}})
        chosen = [records[id_] for id_ in tests[run.name]]
        groups[run.name] = [record["group"] for record in chosen]
        shared = [name for name in chosen[0]["scores"] if all(name in record["scores"] for record in chosen)]
        scores = {name: [float(f"{r['scores'][name]:.5g}") for r in chosen] for name in shared}
        row["tests"][run.name] = {"bytes": found["bytes"], "scores": scores}
    common = {name: settings[name] for name in ("model", "dtype", "data", "where")}
    return common | {"examples": tests, "groups": groups, "rows": list(rows.values())}


def _read(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """A run's settings, metrics, and records by id."""
    settings, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("settings", "metrics"))
    return settings, metrics, {record["id"]: record for record in Run(folder, settings).records}


def write(file: pathlib.Path, collected: dict[str, Any]) -> None:
    """Write what `collect` returns, a cache on a line."""
    head = json.dumps(collected | {"rows": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n".join(json.dumps(row) for row in collected["rows"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{head}[\n{rows}\n]\n}}\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--data", type=pathlib.Path, nargs="+", default=[], help="text files")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/sweep"), help="(%(default)s)")
    parser.add_argument("--collect", type=pathlib.Path, help="write what --output holds to this file, and stop")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS[:2], help="(%(default)s)")
    parser.add_argument("--caches", choices=CACHES, default="rules", help="which list of them (%(default)s)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="caches whose folder's name matches")
    parser.add_argument("--part", default="0/1", help="do every n-th cache, from the i-th on: i/n (%(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="of each text (%(default)s)")
    parser.add_argument("--prompt", type=int, default=1536, help="tokens prefilled (%(default)s)")
    parser.add_argument("--continuation", type=int, default=512, help="tokens scored (%(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of needles, RULER (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=4, help="of each of RULER's tasks and lengths (%(default)s)")
    parser.add_argument("--depths", type=int, default=10, help="of needles (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="examples at once (%(default)s)")
    parser.add_argument(
        "--padding", type=int, help="to multiples of which prompts are padded; the longest unless given"
    )
    parser.add_argument("--dtype", default="float32", help="of weights and cache (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
