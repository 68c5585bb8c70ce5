"""Time new tokens on a cache that holds many: python -m benchmarks.turns.

A row is one call of `mustafar_jax.attend` on one layer's cache of random rows: the next turn of a conversation, a chunk
of a prompt, drafted tokens. Beside it stand the same call on a dense cache, and reading all tokens again, those that
were held and the new ones, into an empty cache of the same kind. A call donates its cache, whose lengths are set back,
so that each does the same. Its first result is checked against attention in float32 on what the cache holds and on the
new tokens, and a row whose check fails shows no time.

Times are of the device, from the profiler, or by the clock where there is no GPU, the median of 7; `clock_us` is by the
clock. Writes benchmarks/results/<device>/turns.json after each row, in which a row that is measured again replaces what
was there.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mustafar_jax as mj
from benchmarks import device_time, synthetic
from benchmarks.attention import SWEEP_BYTES
from benchmarks.origin import where
from benchmarks.synthetic import Shape
from benchmarks.table import Row, Table, attempt, folder_of

CONFIGS = {
    "dense": mj.CompressionConfig.preset("dense"),
    "fast": mj.CompressionConfig.preset("fast"),
    "balanced": mj.CompressionConfig.preset("balanced"),
    "small": mj.CompressionConfig.preset("small"),
    "recommended 0.7": mj.CompressionConfig.recommended(0.7, 0.7),
}
"""The caches, the one first that all are compared with."""
TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}
"""||out - expected|| / ||expected||; matrix products of float32 have TF32 on GPUs."""
CHECKED = 4
"""New tokens that are checked, the last ones: they attend to all others."""
REPEATS = 7
IDENTITY = ("cache", "held", "new", "capacity", "batch", "kv_heads", "group", "head_dim", "dtype")

Tokens = tuple[jax.Array, jax.Array, jax.Array]
"""Query [B, n, N, H], key and value [B, n, K, H]."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is timed: new tokens on a cache.

    Attributes:
        cache: its config, a name in `CONFIGS`.
        shape: of the cache, and the tokens that it holds.
        new: tokens of each sequence that are added.
        capacity: tokens that the cache has room for.
        dtype: of keys, values and queries.
    """

    cache: str
    shape: Shape
    new: int
    capacity: int
    dtype: np.dtype[Any]

    @property
    def again(self) -> "Turn":
        """All tokens, those that are held too, on an empty cache."""
        return dataclasses.replace(
            self, shape=dataclasses.replace(self.shape, tokens=0), new=self.shape.tokens + self.new
        )

    def describe(self) -> Row:
        """The first fields of a row."""
        fields = self.shape.describe()
        del fields["shape"]
        sizes = {"held": fields.pop("tokens"), "new": self.new, "capacity": self.capacity}
        return {"cache": self.cache} | sizes | fields | {"dtype": self.dtype.name}

    def filled(self) -> mj.LayerCache:
        """The cache before, whose rows are random."""
        return _filled(self.shape, CONFIGS[self.cache], self.capacity, self.dtype)

    def tokens(self) -> Tokens:
        """Random new tokens."""
        shape, keys = self.shape, jax.random.split(jax.random.key(1), 3)
        heads = shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads
        query, key, value = (
            jax.random.normal(seed, (shape.batch, self.new, count, shape.head_dim), self.dtype)
            for seed, count in zip(keys, heads, strict=True)
        )
        return query, key, value


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _filled(shape: Shape, config: mj.CompressionConfig, capacity: int, dtype: np.dtype[Any]) -> mj.LayerCache:
    empty = synthetic.empty_cache(shape, config, capacity, dtype)
    if not shape.tokens:
        return empty
    return synthetic.filled_like(empty, jnp.full(shape.batch, shape.tokens, jnp.int32), synthetic.seed_of(0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = _parser().parse_args(arguments)
    origin = where()
    path = folder_of(origin["device"], options.output) / "turns.json"
    table = Table(path, lambda row: tuple(row[field] for field in IDENTITY))
    for row in measure(turns_of(options)):
        table.add(row | {"where": origin})
        print_row(row)


def turns_of(options: argparse.Namespace) -> list[Turn]:
    """All turns that the options ask for, those on dense caches first; a cache is the same for any number of tokens."""
    shape = Shape("turns", options.batch, options.kv_heads, options.group, options.held, options.head_dim)
    sizes = options.held + max(options.new), np.dtype(jnp.dtype(options.dtype))
    return [Turn(name, shape, new, *sizes) for name in CONFIGS for new in options.new]


def measure(turns: Sequence[Turn]) -> Iterator[Row]:
    """A row for each turn; everything is compiled first, side by side."""
    calls = [call for turn in turns for call in (turn, turn.again)]
    programs = device_time.compile_all({key: job for call in calls for key, job in _jobs(call).items()})
    dense: dict[int, float | None] = {}
    for turn in turns:
        row, again = (attempt(functools.partial(measure_turn, call, programs)) for call in (turn, turn.again))
        if turn.cache == "dense":
            dense[turn.new] = row["us"]
        beside = {f"again_{name}": value for name, value in again.items()}
        ratios = {"of_dense": ratio(row["us"], dense[turn.new]), "of_again": ratio(row["us"], again["us"])}
        yield turn.describe() | row | ratios | beside


def _jobs(turn: Turn) -> dict[Any, jax.stages.Lowered | Exception]:
    arguments = jax.eval_shape(turn.filled), *jax.eval_shape(turn.tokens)
    return {
        turn: device_time.lowered(jax.jit(attend, donate_argnums=0), *arguments),
        ("reference", turn): device_time.lowered(jax.jit(reference), *arguments),
    }


def attend(cache: mj.LayerCache, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, mj.LayerCache]:
    """The call that is timed: what new tokens get, and the cache for the next call, as long as before."""
    lengths = cache.lengths
    out, cache = mj.attend(cache, query, key, value)
    return out, dataclasses.replace(cache, lengths=lengths)


def reference(cache: mj.LayerCache, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """What the last new tokens should get: attention in float32, [B, CHECKED, N, H], a sequence at a time.

    Several tokens attend to what the cache holds and, causally, to each other. One attends to what the cache holds when
    it has been added, by which a group may have been packed.
    """
    if query.shape[1] == 1:
        cache = mj.append(cache, key[:, 0], value[:, 0], query=query[:, 0], implementation="xla")
        key, value = key[:, :0], value[:, :0]
    held_key, held_value, lengths = cache.to_dense()
    last, new = query[:, -CHECKED:], key.shape[1]
    position = jnp.arange(last.shape[1]) + new - last.shape[1]
    causal = jnp.arange(new)[None] <= position[:, None]

    def one(sequence: tuple[jax.Array, ...]) -> jax.Array:
        length, query, *tokens = sequence
        held_key, key, held_value, value = (x.astype(jnp.float32) for x in tokens)
        held = jnp.broadcast_to(jnp.arange(cache.capacity) < length, (len(query), cache.capacity))
        visible = jnp.concatenate([held, causal], axis=1)
        keys, values = jnp.concatenate([held_key, key]), jnp.concatenate([held_value, value])
        grouped = query.astype(jnp.float32).reshape(len(query), cache.num_kv_heads, -1, cache.head_dim)
        product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        scores = product("tkgh,skh->kgts", grouped, keys) * cache.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return product("kgts,skh->tkgh", weights, values).reshape(query.shape)

    return lax.map(one, (lengths, last, held_key, key, held_value, value))


def measure_turn(turn: Turn, programs: dict[Any, Any]) -> Row:
    """Microseconds of a call, and bytes of its temporaries, if what it gives is right."""
    program, tokens, cache = programs[turn], turn.tokens(), turn.filled()
    wanted = device_time.run(programs["reference", turn], cache, *tokens)
    out, cache = device_time.run(program, cache, *tokens)
    difference = out[:, -CHECKED:].astype(jnp.float32) - wanted
    error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted))
    row = {"error": error, "temp_bytes": program.memory_analysis().temp_size_in_bytes}
    if not error < TOLERANCE[turn.dtype.name]:
        return row | {"us": None, "reason": f"wrong: error ratio {error:.1e}"}
    return row | time_calls(program, cache, tokens)


def time_calls(program: jax.stages.Compiled, cache: mj.LayerCache, tokens: Tokens) -> Row:
    """Microseconds of a call, on the device or, where there is no GPU, by the clock.

    Between two calls the second-level cache is swept out, as a model's other layers do.
    """
    numbers, clock, device = jnp.zeros(SWEEP_BYTES // 4, jnp.float32), [], []
    for _ in range(REPEATS):
        jax.block_until_ready(_sweep(numbers))
        start = time.perf_counter()
        _, cache = jax.block_until_ready(program(cache, *tokens))
        clock.append((time.perf_counter() - start) * 1e6)
    for _ in range(REPEATS):
        jax.block_until_ready(_sweep(numbers))
        (_, cache), seconds = device_time.profile(program, cache, *tokens, scopes=())
        if not seconds["rest"]:  # no GPU
            break
        device.append(seconds["rest"] * 1e6)
    timed = "profiler" if device else "clock"
    return {"us": statistics.median(device or clock), "timed": timed, "clock_us": statistics.median(clock)}


@jax.jit
def _sweep(numbers: jax.Array) -> jax.Array:
    return numbers + 1


def ratio(one: float | None, other: float | None) -> float | None:
    """One time relative to another; None where either is missing."""
    return one / other if one and other else None


def print_row(row: Row) -> None:
    """One line of the table."""
    name = f"{row['cache']:15s} {row['held']:,} held, {row['new']:4d} new"
    if row["us"] is None:
        print(f"{name}  {row['reason']}", flush=True)
        return
    shown = f"{row['us']:10.1f} us, {row['temp_bytes'] / 1e6:8.2f} MB of temporaries"
    shown += f"; {row['of_dense']:.2f} of dense" if row["of_dense"] else ""
    again = f"; {row['of_again']:.3f} of reading all again" if row["of_again"] else f"; again: {row['again_reason']}"
    print(f"{name}  {shown}{again}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, type=_count)
    add("--held", default=16384, help="tokens that a sequence's cache holds (%(default)s)")
    add("--new", nargs="+", default=[1, 8, 32, 128, 512], help="tokens that are added (%(default)s)")
    add("--batch", default=1, help="sequences (%(default)s)")
    add("--kv-heads", default=8, help="(%(default)s)")
    add("--group", default=4, help="query heads per KV head (%(default)s)")
    add("--head-dim", type=_head_dim, default=128, help="entries of a key or value (%(default)s)")
    add("--dtype", type=str, choices=TOLERANCE, default="bfloat16", help="of all of them (%(default)s)")
    add("--output", type=pathlib.Path, help="folder of the results")
    return parser


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def _head_dim(text: str) -> int:
    if int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text} must be a positive multiple of 32")
    return int(text)


if __name__ == "__main__":
    main()
