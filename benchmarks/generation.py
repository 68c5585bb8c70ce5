"""Time generation with packed caches beside the same model with dense ones: python -m benchmarks.generation.

The models have the shapes of Llama-2-7B and Llama-3-8B and random bfloat16 weights, made on the device. A case is a
batch of prompts of one length, prefilled and then continued by 256 tokens; both sides run the same prefill and the same
decode step, dense caches through cuDNN. With --filled, caches of random rows stand in for what a prefill makes. Each
case has a process of its own: one that fails, or for which memory does not suffice, is noted with its reason, and the
rest goes on. Writes benchmarks/results/<device>/generation.json after each case, in which a case that is run again
replaces what was there, and two plots where matplotlib is installed.

What is compiled is kept in the folder $JAX_COMPILATION_CACHE_DIR, where that is set, else until the program ends.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from benchmarks.attention_cases import RULES
from benchmarks.generation_cases import DTYPE, SHAPES, Case, case_of, identity
from benchmarks.generation_measure import BLOCK, BLOCKS, complete, measure, memory_statistic, run_here
from benchmarks.generation_plots import describe_row, plot_memory, plot_speed
from benchmarks.gpu import no_gpu
from benchmarks.origin import where
from benchmarks.table import Row, Table, folder_of
from mustafar_jax.arguments import parse_size
from mustafar_jax.config import PRESETS
from mustafar_jax.models import memory
from mustafar_jax.pallas_kernels import cuda

TRIAL = "--shapes tiny --contexts 40 --batches 3 --dense-implementation xla tries the program"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases, print and write."""
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(run_here(Case(**json.loads(options.one)), complete if options.complete else measure)))
        return
    if options.describe:
        print(json.dumps({"where": where(), "limit_bytes": memory_statistic("bytes_limit"), "gpu": cuda.device_kind()}))
        return
    jax.config.update("jax_platforms", "cpu")  # the device is left to the processes that run the cases
    with tempfile.TemporaryDirectory() as cache:
        share = memory.USABLE
        device = describe(Launcher(share, 300, cache))
        if device["gpu"] is None and (options.bars or options.shapes != ["tiny"]):
            sys.exit(no_gpu("generation", TRIAL))
        if options.memory and device["limit_bytes"]:
            share *= min(1.0, options.memory * memory.USABLE / device["limit_bytes"])
            device = describe(Launcher(share, 300, cache))
        try:
            cases = list((bar_cases if options.bars else cases_of)(options, device["limit_bytes"]))
        except ValueError as error:
            sys.exit(f"benchmarks.generation: {error}")
        folder = folder_of(device["where"]["device"], options.output)
        flags = {"check_plan": options.check_plan or options.bars, "resume": options.resume}
        run_all(cases, folder, device, Launcher(share, options.timeout, cache), **flags)


def cases_of(options: argparse.Namespace, limit: int | None) -> Iterator[Case]:
    """The cases that the options ask for, dense ones before those that are compared with them.

    Args:
        options: of the command line.
        limit: bytes that a case may take; None where the device does not say, and then "largest" is an error.
    """
    for shape in options.shapes:
        for context in options.contexts:
            for batch in options.batches:
                sizes = shape, context, batch, options.new_tokens, options.split
                for sparsity in options.sparsities:
                    yield case_with(options, limit, *sizes, sparsity)
                for preset in options.presets:
                    yield case_with(options, limit, *sizes, preset=preset)


def bar_cases(options: argparse.Namespace, limit: int | None) -> Iterator[Case]:
    """The cases that the comparisons of `benchmarks.bars` need, the most telling ones first; arguments as `cases_of`.

    Parts of a step are timed at batch 8, where dense attention is compared with dense attention by itself.
    """
    for context, batch, sparsities, new_tokens in (
        (16384, 8, (0.0, 0.7, 0.5), 256),
        (16384, 0, (0.0, 0.7, 0.5), 256),
        (65536, 1, (0.0, 0.7, 0.5), 256),
        (16384, 1, (0.0, 0.7), 256),
        (4096, 8, (0.7,), 4096),
    ):
        for sparsity in sparsities:
            split = (context, batch) == (16384, 8)
            yield case_with(options, limit, "llama-3-8b", context, batch, new_tokens, split, sparsity)


def case_with(
    options: argparse.Namespace,
    limit: int | None,
    shape: str,
    context: int,
    batch: int,
    new_tokens: int,
    split: bool,
    sparsity: float = 0.0,
    preset: str | None = None,
) -> Case:
    """The case of these sizes; batch 0 is the largest that fits, which is an error where `limit` is None."""
    how = options.rule, split, preset, options.filled, options.chunk
    case = Case(shape, context, sparsity, batch or 1, None, not batch, new_tokens, *how)
    name = options.dense_implementation if case.is_dense else options.implementation
    case = dataclasses.replace(case, implementation=name)
    if not case.largest:
        return case
    if limit is None:
        raise ValueError("--batches largest: this device does not say how much memory it has")
    sizes = {"capacity": case.capacity, "dtype": DTYPE}
    fits = memory.largest_batch(limit, SHAPES[shape], case.compression, **sizes)
    return dataclasses.replace(case, batch=max(1, fits))


def run_all(
    cases: Sequence[Case],
    folder: pathlib.Path,
    device: dict[str, Any],
    ask: Callable[[list[str]], dict[str, Any]],
    *,
    check_plan: bool = False,
    resume: bool = False,
) -> None:
    """Run each case, and write what is known after it.

    Args:
        cases: what is to be run.
        folder: of the results.
        device: where it is run, as `describe` says.
        ask: a `Launcher`.
        check_plan: at the end, try largest batches 5 % larger than planned, rounded up, where what was planned did fit.
        resume: leave out cases that a row of the same commit already tells about.
    """
    table = Table(folder / "generation.json", identity)
    try:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case}", flush=True)
            if resume and (found := _row_of(case, device, table.rows)):
                print("    " + describe_row(found, table.rows), flush=True)
                continue
            table.add(run_one(case, device["limit_bytes"], ask) | device)
            print("    " + describe_row(table.rows[-1], table.rows), flush=True)
        for case in cases if check_plan else ():
            row = _row_of(case, device, table.rows)
            if row and case.largest and row["batch"] == row["planned_batch"] and "larger_fits" not in row:
                table.add(row | run_larger(case_of(row), ask))
    finally:
        plot_speed(table.rows, folder / "generation_speed.png")
        plot_memory(table.rows, folder / "generation_memory.png")


def _row_of(case: Case, device: dict[str, Any], rows: list[Row]) -> Row | None:
    """The row of a case that ran, on this device and at this commit, and tells as much."""
    wanted = identity(dataclasses.asdict(case) | device)
    commit = device["where"]["commit"]
    for row in rows:
        same = identity(row) == wanted and row["where"]["commit"] == commit
        if same and row["status"] == "ok" and row["split"] >= case.split:
            return row
    return None


def run_larger(case: Case, ask: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """Whether 5 % more sequences than planned, rounded up, fit; if not, the plan is true within that."""
    larger = dataclasses.replace(case, batch=math.ceil(1.05 * case.batch))
    print(f"does the plan leave room? {larger}", flush=True)
    answer = ask(["--one", json.dumps(dataclasses.asdict(larger)), "--complete"])
    found = {"ok": True, "out of memory": False}.get(answer["status"])  # None: it failed for another reason
    print(f"    {answer['status']}: {answer.get('reason', 'it fits')}", flush=True)
    return {"larger_batch": larger.batch, "larger_fits": found}


def run_one(case: Case, limit: int | None, ask: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
    """A case's row: from a process of its own, unless it is known not to fit."""
    planned = case.plan.total
    plan = {"planned_batch": case.batch, "planned_bytes": planned}
    if limit is not None and planned > limit:
        reason = f"the memory plan: {planned / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
        return dataclasses.asdict(case) | plan | {"status": "does not fit", "reason": reason}
    while True:
        row = ask(["--one", json.dumps(dataclasses.asdict(case))])
        row = dataclasses.asdict(case) | plan | row
        if not case.largest or case.batch == 1 or row["status"] != "out of memory":
            return row
        print(f"    batch {case.batch} does not fit: {row['reason']}", flush=True)
        case = dataclasses.replace(case, batch=case.batch - max(1, case.batch // 64))


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Has this program answer in a process of its own, whatever becomes of that.

    Attributes:
        share: of the device's memory that the process may take.
        timeout: seconds that it may take.
        cache: a folder for what is compiled, which later processes find there; $JAX_COMPILATION_CACHE_DIR comes first.
    """

    share: float
    timeout: float
    cache: str

    def __call__(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The last line of the process's output, or why there is none."""
        command = [sys.executable, "-m", "benchmarks.generation", *arguments]
        environment = {"JAX_COMPILATION_CACHE_DIR": self.cache} | os.environ
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{self.share:.4f}"
        try:
            result = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not finished after {self.timeout:.0f} s"}
        if result.returncode:
            return {"status": "failed", "reason": f"the process ended with status {result.returncode}"}
        answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return answer


def describe(launch: Launcher) -> dict[str, Any]:
    """Where the cases run, and how many bytes a process can have there."""
    answer = launch(["--describe"])
    if "where" not in answer:
        sys.exit(f"benchmarks.generation: the device cannot be used: {answer['reason']}")
    return answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["llama-2-7b", "llama-3-8b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help="of the models (%(default)s)")
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[4096, 16384, 65536], help="tokens of each prompt (%(default)s)"
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=_batch,
        default=[1, 8, 32, 0],
        metavar="N|largest",
        help="prompts; largest: as many as fit (1 8 32 largest)",
    )
    parser.add_argument(
        "--sparsities",
        nargs="+",
        type=float,
        default=[0.0, 0.5, 0.7],
        help="of keys and values; 0: a dense cache (%(default)s)",
    )
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=[], help="caches by name, beside these")
    parser.add_argument("--rule", choices=RULES, default="recommended", help="of pruning (%(default)s)")
    parser.add_argument("--implementation", help="of attention on packed caches (the best that works)")
    parser.add_argument("--dense-implementation", default="cudnn", help="of attention on dense caches (%(default)s)")
    parser.add_argument(
        "--new-tokens", type=_new_tokens, default=256, help="how long prompts are continued (%(default)s)"
    )
    parser.add_argument("--memory", type=parse_size, help="measure as on a device of this size, such as 80GB")
    parser.add_argument("--timeout", type=float, default=540, help="seconds that a case may take (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    parser.add_argument(
        "--no-split",
        dest="split",
        action="store_false",
        help="leave out what each part of a step takes, for which it is compiled again",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--bars", action="store_true", help="the cases that benchmarks.bars needs; sizes are not looked at"
    )
    kind.add_argument(
        "--filled", action="store_true", help="fill caches with random rows in place of a prefill, and time steps alone"
    )
    kind.add_argument(
        "--chunk", type=_tokens, metavar="N", help="prefill N tokens of all prompts at a time (prompts in one piece)"
    )
    parser.add_argument(
        "--check-plan", action="store_true", help="try 5 %% more than the largest batch, too; --bars does"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what has run at this commit")
    parser.add_argument("--complete", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    return parser


def _batch(text: str) -> int:
    """0 stands for the largest that fits."""
    number = 0 if text == "largest" else int(text)
    if number < 1 and text != "largest":
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1, or largest")
    return number


def _tokens(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _new_tokens(text: str) -> int:
    if int(text) < 2 * BLOCKS * BLOCK or int(text) % (BLOCKS * BLOCK):
        raise argparse.ArgumentTypeError(
            f"{text} must be a multiple of {BLOCKS * BLOCK}, at least {2 * BLOCKS * BLOCK}"
        )
    return int(text)


if __name__ == "__main__":
    main()
