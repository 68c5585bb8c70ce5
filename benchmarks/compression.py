"""Time pruning and packing: python -m benchmarks.compression.

Prompts, beside copying as many bytes (dense rows read, packed rows written). And decode steps: what `append` takes, on
average over the steps in which every sequence packs one group; less what it takes on a dense cache, which has to write
its tokens, too; beside the attention of the same steps. Each row is checked against the XLA implementation first, and
shows no time where it fails. Times are of the device, from the profiler; `clock_us` is by the clock. Writes
benchmarks/results/<device>/compression.json after each row, in which a row that is measured again replaces what was
there.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mustafar_jax as mj
from benchmarks import device_time, synthetic
from benchmarks.attention import CALLS, REPEATS, TOLERANCE, copy_bandwidth, present
from benchmarks.attention_cases import CODES, RULES, A, B, config_of
from benchmarks.gpu import require_gpu
from benchmarks.origin import where
from benchmarks.synthetic import DTYPE, Shape
from benchmarks.table import Row, Table, attempt, folder_of
from mustafar_jax.backends.xla import packing as xla
from mustafar_jax.cache import PackedCache
from mustafar_jax.cache.packing import Leaving, packing_of
from mustafar_jax.operands import Mean, Packing
from mustafar_jax.pallas_kernels.triton import backend as triton
from mustafar_jax.pruning import Context, magnitude_mask, rescale_to_norm
from mustafar_jax.rows import Rows

SHAPES = {"A": A, "B": B, "tiny": Shape("tiny", 2, 2, 2, 192, 64)}
SCOPES = ["append", "decode_attention"]

Ranking = tuple[jax.Array | None, jax.Array | None]
"""A mean key and weights [B, K, H], where the rule has them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = _parser().parse_args(arguments)
    if options.shapes != ["tiny"]:
        require_gpu("compression", "--shapes tiny --interpret tries the program")
    origin, bandwidth = where(), copy_bandwidth()
    identity = ("shape", "what", "rule", "implementation", "attention", "sparsity")
    path = folder_of(origin["device"], options.output) / "compression.json"
    table = Table(path, lambda row: tuple(row.get(field) for field in identity))
    for name in options.shapes:
        shape = SHAPES[name]
        for row in (*measure_prompts(shape, options, bandwidth), *measure_steps(shape, options)):
            table.add(shape.describe() | row | {"where": origin})
            print_row(table.rows[-1])


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A whole prompt's keys and values, pruned and packed by one call of the kernel."""

    shape: Shape
    rule: str
    sparsity: float
    interpret: bool = False

    @property
    def config(self) -> mj.CompressionConfig:
        """Of the cache that they would be for."""
        return config_of(self.rule, self.sparsity)

    def targets(self) -> tuple[Rows, Rows]:
        """Packed keys and values that hold nothing."""
        leading = (self.shape.batch, self.shape.kv_heads)
        formats = self.config.formats(self.shape.head_dim, np.dtype(DTYPE))
        keys, values = (how.empty(leading, self.shape.tokens) for how in formats)
        return keys, values

    def tokens(self) -> list[jax.Array]:
        """Random keys and values [B, S, K, H]."""
        shape = self.shape
        size = (shape.batch, shape.tokens, shape.kv_heads, shape.head_dim)
        return [jax.random.normal(key, size, DTYPE) for key in jax.random.split(jax.random.key(0))]

    def ranking(self) -> Ranking:
        """The mean key [B, K, H] where keys are centred, and their weights [B, K, H] where they are weighed."""
        size = (self.shape.batch, self.shape.kv_heads, self.shape.head_dim)
        mean = jax.random.normal(jax.random.key(1), size) if self.config.center_keys else None
        weight = jax.random.uniform(jax.random.key(3), size, minval=0.1) if self.config.weigh_keys else None
        return mean, weight

    def abstract(self) -> tuple[Any, Any, Any]:
        """Targets, tokens, and what keys are ranked with, as shapes."""
        return jax.eval_shape(lambda: (self.targets(), self.tokens(), self.ranking()))

    def pack(self, targets: tuple[Rows, Rows], tokens: list[jax.Array], ranking: Ranking) -> tuple[Rows, Rows]:
        """The targets with all tokens in them."""
        return triton.pack(self._packing(targets, tokens, ranking), interpret=self.interpret)

    def _packing(self, targets: tuple[Rows, Rows], tokens: list[jax.Array], ranking: Ranking) -> Packing:
        """What a prefill of these tokens asks of a backend."""
        (mean, weight), rows = ranking, tokens[0].shape[1]
        zeros = jnp.zeros(tokens[0].shape[0], jnp.int32)
        leaving = Leaving(tokens[0], tokens[1], first=zeros, start=zeros, held=zeros + rows, rows=rows, head_axis=2)
        taken_off = None if mean is None else self._mean(mean)
        keys, values = targets
        return packing_of(leaving, self.config, (keys, values), taken_off, weight, lambda _, valid: Context(valid))

    def _mean(self, key: jax.Array) -> Mean:
        return Mean(key, self.shape.inv_freq.astype(np.float32), self.config.sink_tokens)

    def error(self, packed: tuple[Rows, Rows], tokens: list[jax.Array], ranking: Ranking) -> jax.Array:
        """How wrong packed rows are, 0 if not at all: the worst of keys and values."""
        return (self.wrong_codes if self.rule in CODES else self.wrong_numbers)(packed, tokens, ranking)

    def wrong_codes(self, packed: tuple[Rows, Rows], tokens: list[jax.Array], ranking: Ranking) -> jax.Array:
        """The share of codes that are not XLA's."""

        def one(arguments: Any) -> jax.Array:
            packed, tokens, ranking = jax.tree.map(lambda x: x[None, None], arguments)
            tokens = [x.swapaxes(1, 2) for x in tokens]
            wanted = xla.pack(self._packing(packed, tokens, ranking))
            pairs = zip(packed, wanted, strict=True)
            return jnp.stack([different(rows.to_array(), other.to_array()) for rows, other in pairs])

        by_head = (packed, [x.swapaxes(1, 2) for x in tokens], ranking)
        return lax.map(one, _by_head(by_head)).mean(axis=0).max()

    def wrong_numbers(self, packed: tuple[Rows, Rows], tokens: list[jax.Array], ranking: Ranking) -> jax.Array:
        """How far plain numbers are from what they should be.

        The sum of two: ||packed - expected|| / ||expected||, where what is expected has the mask that was found; and by
        what share the magnitudes that were kept fall short of the largest ones. So a mask may differ where magnitudes
        are equal but for rounding, as distances from a rotated mean are.
        """
        rescale = self.config.rescale_values

        def one(arguments: Any) -> jax.Array:
            packed, (key, value), (mean, weight) = arguments
            held = key.astype(jnp.float32)
            if mean is not None:
                positions = self.config.sink_tokens + jnp.arange(key.shape[0])
                held -= self._mean(mean[None, None]).at(positions[None])[0, 0]
            ranked = (held if weight is None else held * weight).astype(key.dtype)
            held = held.astype(key.dtype)
            sums = []
            for rows, x, by, rescaled in zip(packed, (held, value), (ranked, value), (False, rescale), strict=True):
                mask, magnitudes = rows.mask(), jnp.abs(by.astype(jnp.float32))
                wanted = jnp.where(mask, rescale_to_norm(x, mask) if rescaled else x, 0).astype(jnp.float32)
                difference = rows.to_array().astype(jnp.float32) - wanted
                kept = [jnp.sum(magnitudes, where=m) for m in (mask, magnitude_mask(by, self.sparsity))]
                sums.append(jnp.stack([jnp.sum(difference**2), jnp.sum(x.astype(jnp.float32) ** 2), *kept]))
            return jnp.stack(sums)

        by_head = _by_head((packed, [x.swapaxes(1, 2) for x in tokens], ranking))
        sums = lax.map(one, by_head).sum(axis=0)
        return (jnp.sqrt(sums[:, 0] / sums[:, 1]) + jnp.abs(1 - sums[:, 2] / sums[:, 3])).max()


def _by_head(arrays: Any) -> Any:
    """[B, K, ...] -> [B * K, ...], of each array of a pytree."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)


def cases_of(options: argparse.Namespace, sparsities: Iterable[float]) -> list[tuple[str, float]]:
    """Rules of pruning at each sparsity, then configs of codes."""
    return [(rule, sparsity) for sparsity in sparsities for rule in options.rules] + [
        (rule, 0.0) for rule in options.codes
    ]


def measure_prompts(shape: Shape, options: argparse.Namespace, bandwidth: float) -> Iterator[Row]:
    """Prune and pack all of a prompt's keys and values, at each sparsity by each rule."""
    cases = cases_of(options, options.sparsities)
    prompts = [Prompt(shape, rule, sparsity, options.interpret) for rule, sparsity in cases]
    programs = device_time.compile_all({key: job for prompt in prompts for key, job in _prompt_jobs(prompt).items()})
    for prompt in prompts:
        targets, tokens, _ = prompt.abstract()
        nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((tokens, targets)))
        fields = {"what": "prompt", "rule": prompt.rule, "implementation": "triton", "sparsity": prompt.sparsity}
        times = {"bytes": nbytes, "copy_us": nbytes / bandwidth * 1e6, "copy_bytes_per_s": bandwidth}
        yield fields | times | attempt(functools.partial(measure_prompt, prompt, programs))


def _prompt_jobs(prompt: Prompt) -> dict[Any, jax.stages.Lowered | Exception]:
    targets, tokens, ranking = prompt.abstract()
    return {
        ("pack", prompt): device_time.lowered(jax.jit(prompt.pack, donate_argnums=0), targets, tokens, ranking),
        ("error", prompt): device_time.lowered(jax.jit(prompt.error), targets, tokens, ranking),
    }


def measure_prompt(prompt: Prompt, programs: dict[Any, Any]) -> Row:
    """Microseconds of a call, if it is right."""
    pack, tokens, ranking = programs["pack", prompt], prompt.tokens(), prompt.ranking()
    packed = device_time.run(pack, prompt.targets(), tokens, ranking)
    error = float(device_time.run(programs["error", prompt], packed, tokens, ranking))
    if not error < TOLERANCE:
        return {"us": None, "error": error, "reason": f"wrong: error ratio {error:.1e}"}
    packed, clock = time_chain(pack, packed, tokens, ranking)
    seconds = device_time.profile(pack, packed, tokens, ranking, scopes=())[1]["rest"]
    return {
        "error": error,
        "us": seconds * 1e6 or clock,
        "timed": "profiler" if seconds else "clock",
        "clock_us": clock,
    }


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps in which every sequence of a full cache fills, and packs, one group.

    Attributes:
        shape, rule, sparsity: of the cache.
        implementation: of pruning and packing.
        attention: of attention.
    """

    shape: Shape
    rule: str
    sparsity: float
    implementation: str
    attention: str

    @property
    def config(self) -> mj.CompressionConfig:
        """The cache's."""
        return config_of(self.rule, self.sparsity)

    @property
    def dense(self) -> "Steps":
        """The same on a dense cache."""
        return dataclasses.replace(self, rule="published", sparsity=0.0, attention="cudnn")

    @property
    def length(self) -> int:
        """Tokens that are held before: with one more, a group leaves the dense part."""
        config, groups = self.config, self.config.packed_tokens(self.shape.tokens) // self.config.group
        return config.sink_tokens + config.residual_length + groups * config.group - 1

    def cache(self) -> mj.LayerCache:
        """Full of random rows, and of random recent tokens; with room for the steps."""
        tokens = self.length + 1 + self.config.group
        shape = dataclasses.replace(self.shape, tokens=tokens)
        cache = synthetic.full_cache(shape, self.config, synthetic.scales("random", shape))
        return dataclasses.replace(cache, lengths=jnp.full(shape.batch, self.length, jnp.int32))

    def tokens(self) -> list[jax.Array]:
        """Keys and values of the steps, [steps, B, K, H]."""
        size = (self.config.group, self.shape.batch, self.shape.kv_heads, self.shape.head_dim)
        return [jax.random.normal(key, size, DTYPE) for key in jax.random.split(jax.random.key(2))]

    def run(self, cache: mj.LayerCache, tokens: list[jax.Array], query: jax.Array) -> tuple[mj.LayerCache, jax.Array]:
        """All steps, each an `append` and attention by queries that depend on the step before."""

        def step(carry: tuple[mj.LayerCache, jax.Array], token: list[jax.Array]) -> tuple[Any, None]:
            cache, out = carry
            cache = mj.append(cache, *token, implementation=self.implementation)
            asked = (query + 1e-2 * out).astype(query.dtype)
            return (cache, mj.decode_attention(asked, cache, implementation=self.attention)), None

        return lax.scan(step, (cache, jnp.zeros_like(query)), tokens)[0]

    def written(self, cache: mj.LayerCache) -> list[jax.Array]:
        """What the steps left, float32: the group packed, as it is held, and the dense slots; of keys and of values."""
        assert isinstance(cache, PackedCache)
        first = self.length + 1 - self.config.residual_length - self.config.group - self.config.sink_tokens
        rows = [
            store.packed.to_array()[:, :, first : first + self.config.group] for store in (cache.keys, cache.values)
        ]
        return [x.astype(jnp.float32) for x in (*rows, cache.keys.dense, cache.values.dense)]


def measure_steps(shape: Shape, options: argparse.Namespace) -> Iterator[Row]:
    """Steps at the largest sparsity, by each rule, with each implementation of attention that runs here."""
    rows = [
        Steps(shape, rule, sparsity, implementation, attention)
        for rule, sparsity in cases_of(options, [max(options.sparsities)])
        for implementation in options.implementations
        for attention in options.attention
    ]
    references = {steps: dataclasses.replace(steps, implementation="xla", attention="xla") for steps in rows}
    needed = [*references.values(), *(steps.dense for steps in rows), *rows]
    programs = device_time.compile_all({steps: _steps_job(steps) for steps in dict.fromkeys(needed)})
    for steps in rows:
        fields = dataclasses.asdict(steps) | {"what": "steps"}
        del fields["shape"]
        yield fields | attempt(functools.partial(measure_step, steps, programs, references[steps]))


def _steps_job(steps: Steps) -> jax.stages.Lowered | Exception:
    arguments = jax.eval_shape(lambda: (steps.cache(), steps.tokens(), synthetic.query(steps.shape)))
    return device_time.lowered(jax.jit(steps.run, donate_argnums=0), *arguments)


def measure_step(steps: Steps, programs: dict[Steps, Any], reference: Steps) -> Row:
    """Microseconds of a step's compression and of its attention, if what is packed is right."""
    tokens, query = steps.tokens(), synthetic.query(steps.shape)

    def held(steps: Steps) -> list[jax.Array]:
        return steps.written(device_time.run(programs[steps], steps.cache(), tokens, query)[0])

    error = max(float(different(one, other)) for one, other in zip(held(steps), held(reference), strict=True))
    if not error < TOLERANCE:
        return {"us": None, "error": error, "reason": f"wrong: error ratio {error:.1e}"}
    clock = time_fresh(programs[steps], steps.cache, tokens, query) / steps.config.group
    append, attention = time_parts(steps, programs[steps])
    if not attention:
        reason = "no GPU: nothing tells compression from attention"
        return {"error": error, "clock_us": clock, "us": None, "reason": reason}
    dense_append, _ = time_parts(steps.dense, programs[steps.dense])
    us = append - dense_append
    parts = {"append_us": append, "dense_append_us": dense_append, "attention_us": attention, "share": us / attention}
    return {"error": error, "clock_us": clock, "us": us} | parts


def time_parts(steps: Steps, program: Any) -> list[float]:
    """Microseconds of a step's `append` and of its attention, on the device; 0 where there is no GPU."""
    arguments = steps.cache(), steps.tokens(), synthetic.query(steps.shape)
    device_time.run(program, steps.cache(), *arguments[1:])
    _, seconds = device_time.profile(program, *arguments, scopes=SCOPES)
    return [seconds[scope] / steps.config.group * 1e6 for scope in SCOPES]


def different(one: jax.Array, other: jax.Array) -> jax.Array:
    """The share of entries that differ by more than rounding; a few may, where what to keep was nearly a tie."""
    return jnp.mean(jnp.abs(one - other) > 0.02 * jnp.sqrt(jnp.mean(other**2)))


def time_chain(function: Callable[..., Any], state: Any, *arguments: Any) -> tuple[Any, float]:
    """The last state, and microseconds per call of state = function(state, ...), whose state is donated; the median."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            state = function(state, *arguments)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return state, statistics.median(times)


def time_fresh(function: Callable[..., Any], make: Callable[[], Any], *arguments: Any) -> float:
    """Microseconds per call of function(state, ...), each on a state of its own, which is donated; the median."""
    times = []
    for _ in range(REPEATS):
        state = jax.block_until_ready(make())
        start = time.perf_counter()
        jax.block_until_ready(function(state, *arguments))
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def print_row(row: Row) -> None:
    """One line of the table."""
    name = f"{row['shape']:4s} {row['what']:6s} {row['rule']:11s} {row['sparsity']} {row['implementation']:6s}"
    if row["us"] is None:
        shown = row["reason"]
    elif row["what"] == "prompt":
        shown = f"{row['us']:8.1f} us  {row['copy_us'] / row['us']:.2f} of a copy's speed"
    else:
        beside = f"{row['append_us']:.2f} beside {row['dense_append_us']:.2f} of a dense cache"
        shown = f"{row['us']:8.2f} us a step ({beside}), {row['share']:.1%} of attention ({row['attention']})"
    print(f"{name}  {shown}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["A", "B"], help="(%(default)s)")
    parser.add_argument("--rules", nargs="*", choices=RULES, default=[*RULES], help="of pruning (%(default)s)")
    codes = "configs of codes (%(default)s)"
    parser.add_argument("--codes", nargs="*", choices=CODES, default=["fast", "balanced", "small"], help=codes)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7], help="(%(default)s)")
    parser.add_argument(
        "--implementations", nargs="+", default=["triton"], help="of a step's pruning and packing (%(default)s)"
    )
    parser.add_argument("--attention", nargs="+", default=present(), help="of a step's attention (%(default)s)")
    parser.add_argument(
        "--interpret", action="store_true", help="prompts through the interpreter, where there is no GPU"
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder of the results")
    return parser


if __name__ == "__main__":
    main()
