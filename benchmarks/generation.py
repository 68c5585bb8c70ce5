"""Time generation with packed caches beside the same model with dense ones: python -m benchmarks.generation.

The models have the shapes of Llama-2-7B and Llama-3-8B and random bfloat16 weights, made on the device. A case is a
batch of prompts of one length, prefilled and then continued by 256 tokens; both sides run the same prefill and the same
decode step, dense caches through cuDNN. Each case has a process of its own: one that fails, or for which memory does
not suffice, is noted with its reason, and the rest goes on. Writes benchmarks/results/<device>/generation.json after
each case, in which a case that is run again replaces what was there, and two plots where matplotlib is installed.

What is compiled is kept in the folder $JAX_COMPILATION_CACHE_DIR, where that is set, else until the program ends.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from rich.console import Console
from rich.progress import Progress

from benchmarks import device_time
from benchmarks.attention import RULES
from benchmarks.gpu import no_gpu
from benchmarks.origin import where
from benchmarks.table import Row, Table, folder_of
from mustafar_jax.arguments import parse_size
from mustafar_jax.config import PRESETS, CompressionConfig
from mustafar_jax.generation import DENSE, Caches, decode_step, prefill_prompt
from mustafar_jax.models import Llama, ModelConfig, memory
from mustafar_jax.pallas_kernels import cuda

DTYPE = jnp.bfloat16
BLOCK = 32
"""Steps of one call: each sequence packs one group in it."""
BLOCKS = 2
"""Calls that are timed together; what remains of a case's steps is a call to warm up and one under the profiler."""
LONG, SHORT = 30.0, 10.0
"""Seconds of prefill above which it runs once: its time is then that of all layers but the first, which compiles; and
below which it runs three times more, otherwise once more."""
SCOPES = {"decode_attention": "attention", "append": "compression", "rest": "rest"}

_COMMON: dict[str, Any] = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128}
SHAPES = {
    "llama-2-7b": ModelConfig(
        vocab_size=32000, intermediate_size=11008, num_kv_heads=32, max_position_embeddings=1 << 20, **_COMMON
    ),
    "llama-3-8b": ModelConfig(
        vocab_size=128256, intermediate_size=14336, num_kv_heads=8, max_position_embeddings=1 << 20,
        rope_theta=500000.0, **_COMMON,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, max_position_embeddings=1 << 20, rope_theta=100000.0, tie_word_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
        max_position_embeddings=1 << 20,
    ),
}  # fmt: skip
"""The models' shapes; "tiny" is for trying the program where there is no GPU."""

TRIAL = "--shapes tiny --contexts 40 --batches 3 --dense-implementation xla tries the program"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        shape: a name in `SHAPES`.
        context: tokens of each prompt.
        sparsity: of keys and values, where there is no preset; 0 is a dense cache.
        batch: prompts.
        implementation: of attention during decoding.
        largest: whether `batch` is the largest that the memory plan lets fit, or less where that did not.
        new_tokens: how long the prompts are continued; a multiple of 64, at least 128.
        rule: of pruning, a name in `attention.RULES`.
        split: whether each part of a step is timed, for which it is compiled again.
        preset: the caches' config by its name, in place of a rule and a sparsity.
    """

    shape: str
    context: int
    sparsity: float
    batch: int
    implementation: str | None
    largest: bool = False
    new_tokens: int = 256
    rule: str = "recommended"
    split: bool = True
    preset: str | None = None

    @property
    def compression(self) -> CompressionConfig:
        """The caches' config."""
        if self.preset:
            return CompressionConfig.preset(self.preset)
        return RULES[self.rule](self.sparsity, self.sparsity) if self.sparsity else DENSE

    @property
    def is_dense(self) -> bool:
        """Whether the caches are dense ones."""
        return self.compression.is_dense

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's cache has room for."""
        return self.context + self.new_tokens

    @property
    def plan(self) -> memory.MemoryPlan:
        """What the case takes, as planned."""
        sizes = {"batch": self.batch, "capacity": self.capacity}
        return memory.plan(SHAPES[self.shape], self.compression, **sizes, dtype=DTYPE)

    @property
    def name(self) -> str:
        """Of the caches."""
        return "dense" if self.is_dense else self.preset or f"{self.rule} {self.sparsity}"

    def __str__(self) -> str:
        cache = "dense" if self.is_dense else f"{self.name} ({self.implementation or 'best'})"
        return f"{self.shape}, {self.context:,} tokens, batch {self.batch}{' (largest)' * self.largest}, {cache}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases, print and write."""
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(run_here(Case(**json.loads(options.one)), complete if options.complete else measure)))
        return
    if options.describe:
        print(json.dumps({"where": where(), "limit_bytes": _memory("bytes_limit"), "gpu": cuda.device_kind()}))
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
    case = Case(shape, context, sparsity, batch or 1, None, not batch, new_tokens, options.rule, split, preset)
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
    table = Table(folder / "generation.json", _identity)
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
    wanted = _identity(dataclasses.asdict(case) | device)
    commit = device["where"]["commit"]
    for row in rows:
        same = _identity(row) == wanted and row["where"]["commit"] == commit
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


def run_here(case: Case, run: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
    """What `run`, `measure` or `complete`, tells in this process; an error is an answer."""
    try:
        return {"status": "ok"} | run(case)
    except Exception as error:
        full = any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY"))
        status = "out of memory" if full else "failed"
        return {"status": status, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def complete(case: Case) -> dict[str, Any]:
    """Prefill and decode, and measure nothing."""
    model, tokens = _model_and_tokens(case)
    token, caches, _ = _prefill(model, tokens, case, show=True)
    decode = lower_decode(model, token, caches, case.implementation).compile()
    for _ in range(case.new_tokens // BLOCK):
        token, caches = jax.block_until_ready(decode(model, token, caches))
    return {}


def _model_and_tokens(case: Case) -> tuple[Llama, jax.Array]:
    model = random_model(SHAPES[case.shape])
    return model, jax.random.randint(jax.random.key(1), (case.batch, case.context), 0, model.config.vocab_size)


def measure(case: Case) -> dict[str, Any]:
    """Prefill and decode, and say what that took."""
    model, tokens = _model_and_tokens(case)
    token, caches, row = time_prefill(model, tokens, case)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    decode = lower_decode(model, token, caches, case.implementation)
    compiled = decode.compile()
    row |= {"weights_bytes": weights, "cache_bytes": held}
    if (in_use := _memory("bytes_in_use")) is not None:
        row["decode_bytes"] = in_use + getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    token, caches, steps = time_decode(compiled, model, token, caches, case.new_tokens // (BLOCKS * BLOCK) - 1)
    row["peak_bytes"] = _memory("peak_bytes_in_use")
    row |= {"tokens_per_s": case.batch / steps["step_ms"] * 1e3} | steps
    if case.split:
        token, caches, parts = split_decode(decode, model, token, caches)
        row |= parts
    held_tokens = case.capacity - BLOCK * (not case.split)
    if any((cache.overflow | (cache.lengths != held_tokens)).any() for cache in caches):
        raise RuntimeError(f"the caches do not hold the {held_tokens} tokens of prompt and continuation")
    return row


def random_model(config: ModelConfig) -> Llama:
    """A model with random weights, made on the device one by one."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=DTYPE, rngs=nnx.Rngs(0))))
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [_random_weight(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(structure, weights))


@functools.partial(jax.jit, static_argnames="shape")
def _random_weight(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A norm's scale where there is one axis, a matrix where there are more."""
    return jnp.ones(shape, DTYPE) if len(shape) == 1 else 0.02 * jax.random.normal(key, shape, DTYPE)


def time_prefill(model: Llama, tokens: jax.Array, case: Case) -> tuple[jax.Array, Caches, dict[str, Any]]:
    """The first new tokens, the filled caches, and the seconds to the first token."""
    token, caches, seconds = _prefill(model, tokens, case, show=True)
    if seconds >= LONG:
        return token, caches, {"ttft_s": seconds, "ttft_from": "the layers after the first, which compiles"}
    times: list[float] = []
    for _ in range(3 if seconds < SHORT else 1):
        del token, caches  # there may be no room for two
        token, caches, seconds = _prefill(model, tokens, case, show=False)
        times.append(seconds)
    return token, caches, {"ttft_s": statistics.median(times), "ttft_from": f"{len(times)} more, their median"}


def _prefill(model: Llama, tokens: jax.Array, case: Case, *, show: bool) -> tuple[jax.Array, Caches, float]:
    """Prefill; where it is shown, the seconds leave out the first layer's, which compile."""
    times: list[float] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not (show and sys.stderr.isatty())) as bar:
        task = bar.add_task("prefill", total=None)

        def progress(done: int, total: int) -> None:
            times.append(time.perf_counter())
            bar.update(task, completed=done, total=total)

        start = time.perf_counter()
        caches = model.init_cache(case.compression, batch=case.batch, capacity=case.capacity)
        lengths = jnp.full(case.batch, case.context, jnp.int32)
        how: dict[str, Any] = {"implementation": case.implementation, "progress": progress if show else None}
        logits, caches = prefill_prompt(model, tokens, lengths, caches, **how)
        token = jax.block_until_ready(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        jax.block_until_ready(caches)
        seconds = time.perf_counter() - start
    if len(times) > 1:
        seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    return token, caches, seconds


def lower_decode(model: Llama, token: jax.Array, caches: Caches, implementation: str | None) -> jax.stages.Lowered:
    """`BLOCK` greedy steps on the device, caches updated in place: (model, token, caches) -> (token, caches)."""

    def decode(model: Llama, token: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        def step(_: jax.Array, carry: tuple[jax.Array, Caches]) -> tuple[jax.Array, Caches]:
            logits, caches = decode_step(model, *carry, implementation=implementation)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), caches

        return lax.fori_loop(0, BLOCK, step, (token, caches))

    return jax.jit(decode, donate_argnums=(1, 2)).lower(model, token, caches)


def time_decode(
    decode: jax.stages.Compiled, model: Llama, token: jax.Array, caches: Caches, repeats: int
) -> tuple[jax.Array, Caches, dict[str, Any]]:
    """Go on from a token and caches; milliseconds of a step by the clock: of each repeat, and their median."""
    token, caches = jax.block_until_ready(decode(model, token, caches))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(BLOCKS):
            token, caches = decode(model, token, caches)
        jax.block_until_ready(token)
        times.append((time.perf_counter() - start) / (BLOCKS * BLOCK) * 1e3)
    return token, caches, {"step_ms": statistics.median(times), "steps_ms": times, "flatness": flatness(times)}


def flatness(times: Sequence[float]) -> float | None:
    """The largest deviation of times from a straight line, relative to it; None of fewer than 8 times.

    A cache that grows by the same number of tokens from time to time explains a straight line.
    """
    if len(times) < 8:
        return None
    place = np.arange(len(times))
    fitted = np.polynomial.Polynomial.fit(place, times, 1)(place)
    return float(np.max(np.abs(np.asarray(times) / fitted - 1)))


def split_decode(
    lowered: jax.stages.Lowered, model: Llama, token: jax.Array, caches: Caches
) -> tuple[jax.Array, Caches, dict[str, float]]:
    """Go on from a token and caches under the profiler; milliseconds of each part of a step."""
    decode = lowered.compile(compiler_options=device_time.NO_GRAPHS)
    (token, caches), seconds = device_time.profile(decode, model, token, caches, scopes=list(SCOPES)[:-1])
    if not any(seconds.values()):  # no GPU
        return token, caches, {}
    parts = {f"{part}_ms": seconds[scope] / BLOCK * 1e3 for scope, part in SCOPES.items()}
    return token, caches, parts | {"layer_attention_us": parts["attention_ms"] * 1e3 / len(caches)}


def _memory(name: str) -> int | None:
    """One of the device's memory statistics; None where it keeps none."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs of the same case have in common; the largest batch is one with the same memory."""
    case = case_of(row)
    batch = ("largest", row["limit_bytes"]) if case.largest else case.batch
    return (case.shape, case.context, case.compression, case.implementation, case.new_tokens, batch)


def case_of(row: dict[str, Any]) -> Case:
    """The case that a row is of; earlier rows name no preset."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case) if field.name in row})


def dense_beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the same case with a dense cache, if it ran; for the largest batch, dense's own largest."""
    fields = ("shape", "context", "new_tokens", "largest", "limit_bytes" if row["largest"] else "batch")
    same = [r for r in rows if case_of(r).is_dense and r["status"] == "ok" and all(r[f] == row[f] for f in fields)]
    return same[-1] if same and not case_of(row).is_dense else None


def describe_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row in one line, beside the dense one where there is one."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    text = f"{row['tokens_per_s']:.1f} tokens/s, first token {row['ttft_s']:.2f} s, step {row['step_ms']:.2f} ms"
    if row.get("flatness") is not None:
        text += f", within {row['flatness']:.1%} of a straight line"
    if "rest_ms" in row:
        text += " (" + ", ".join(f"{part} {row[f'{part}_ms']:.2f}" for part in SCOPES.values()) + ")"
    if "decode_bytes" in row:
        text += f", peak {row['peak_bytes'] / 1e9:.1f} GB, decoding {row['decode_bytes'] / 1e9:.1f} GB"
    if dense := dense_beside(row, rows):
        text += f"; {row['tokens_per_s'] / dense['tokens_per_s']:.2f} of dense tokens/s"
        text += f", {row['ttft_s'] / dense['ttft_s']:.2f} of its time to the first token"
        text += f", {row['batch'] / dense['batch']:.2f} of its batch" if row["largest"] else ""
    return text


def plot_speed(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Tokens per second against batch, a panel for each shape and context; stars are largest batches."""

    def draw(axes: Any, line: list[dict[str, Any]], **style: Any) -> None:
        batches = [row["batch"] for row in line]
        axes.plot(batches, [row["tokens_per_s"] for row in line], "o-", **style)
        stars = [row for row in line if row["largest"]]
        if stars:
            place = [row["batch"] for row in stars], [row["tokens_per_s"] for row in stars]
            axes.plot(*place, "*", markersize=14, color=style["color"])
        axes.set(xlabel="batch (star: as many as fit)", ylabel="tokens/s while decoding")

    _panels(rows, ("shape", "context"), draw, path)


def plot_memory(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Bytes while decoding against context, a panel for each shape and batch."""

    def draw(axes: Any, line: list[dict[str, Any]], **style: Any) -> None:
        contexts = [row["context"] for row in line]
        axes.plot(contexts, [row["decode_bytes"] / 1e9 for row in line], "o-", **style)
        axes.set(xlabel="tokens of each prompt", ylabel="GB while decoding")

    measured = [row for row in rows if not row["largest"] and row.get("decode_bytes")]
    _panels(measured, ("shape", "batch"), draw, path)


def _cache(row: dict[str, Any]) -> str:
    """What a line of a plot is of."""
    case = case_of(row)
    return case.name if case.is_dense or not case.implementation else f"{case.name}, {case.implementation}"


def _panels(rows: list[dict[str, Any]], fields: tuple[str, str], draw: Callable[..., None], path: pathlib.Path) -> None:
    """One panel for each combination of the fields that was measured, in which each cache is drawn as a line."""
    done = [row for row in rows if row["status"] == "ok" and row["new_tokens"] == Case.new_tokens]
    combinations = sorted({tuple(row[field] for field in fields) for row in done})
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    if not combinations:
        return
    wide = min(3, len(combinations))
    high = math.ceil(len(combinations) / wide)
    figure, grid = pyplot.subplots(high, wide, figsize=(5 * wide, 4 * high), squeeze=False)
    colours = {name: f"C{i}" for i, name in enumerate(sorted({_cache(row) for row in done}))}  # of all panels
    for axes in grid.flat[len(combinations) :]:
        axes.remove()
    for axes, combination in zip(grid.flat, combinations, strict=False):
        panel = [row for row in done if tuple(row[field] for field in fields) == combination]
        for name, colour in colours.items():
            line = sorted((row for row in panel if _cache(row) == name), key=lambda row: (row["batch"], row["context"]))
            if line:
                draw(axes, line, label=name, color=colour)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_title(", ".join(f"{field} {value}" for field, value in zip(fields, combination, strict=True)))
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


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
    parser.add_argument(
        "--bars", action="store_true", help="the cases that benchmarks.bars needs; sizes are not looked at"
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


def _new_tokens(text: str) -> int:
    if int(text) < 2 * BLOCKS * BLOCK or int(text) % (BLOCKS * BLOCK):
        raise argparse.ArgumentTypeError(
            f"{text} must be a multiple of {BLOCKS * BLOCK}, at least {2 * BLOCKS * BLOCK}"
        )
    return int(text)


if __name__ == "__main__":
    main()
