"""What the results of a device show of what is aimed at: python -m benchmarks.bars benchmarks/results/DEVICE.

Reads attention.json, compression.json, generation.json and agreement.json there, as far as they exist, and prints a
line for each bar: whether it is passed, what was measured, and what is wanted. A bar for which rows are missing, or
failed, says so. Ratios are of times on the device, by the published rule, unless said otherwise.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.attention_cases import PUBLISHED_KERNELS, RULES, SETS
from benchmarks.synthetic import MASKS
from benchmarks.table import Row

KERNELS = {"triton": "Triton", "mosaic_gpu": "Mosaic GPU"}
DENSE = "dense, cuDNN"
MODEL = "llama-3-8b"


class MissingError(LookupError):
    """There is no row with a result."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """Something that is aimed at.

    Attributes:
        text: what is measured.
        wanted: the most that it may be, or the least if `at_least`.
        measure: finds it; raises MissingError.
        at_least: see `wanted`.
    """

    text: str
    wanted: float
    measure: Callable[["Results"], float]
    at_least: bool = False

    def line(self, results: "Results") -> str:
        """The verdict in one line."""
        relation = f"{'>=' if self.at_least else '<='} {self.wanted:g}"
        try:
            measured = self.measure(results)
        except MissingError as missing:
            return f"missing  {self.text}: {relation} is wanted; there is no {missing}"
        passed = measured >= self.wanted if self.at_least else measured <= self.wanted
        return f"{'pass' if passed else 'FAIL':8s} {self.text}: {measured:.3g} ({relation} is wanted)"


class Results:
    """The rows of a device's result files."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Read what the folder holds."""

        def read(name: str) -> Any:
            path = folder / f"{name}.json"
            return json.loads(path.read_text()) if path.exists() else {}

        names = ("attention", "compression", "generation")
        self._rows = {name: [row for row in read(name).get("rows", []) if "where" in row] for name in names}
        self._agreement: Row = read("agreement")

    def attention(self, shape: str, name: str) -> Row:
        """A row with a time."""
        return self._one("attention", lambda row: row["us"], shape=shape, name=name)

    def us(self, shape: str, sparsity: float, kernel: str, mask: str = "random") -> float:
        """Microseconds of a kernel by the published rule."""
        suffix = f", {mask} mask" * (mask != "random")
        return float(self.attention(shape, f"published {sparsity}, {kernel}{suffix}")["us"])

    def of_dense(self, shape: str, sparsity: float, kernel: str) -> float:
        """The same, relative to cuDNN's dense attention."""
        return self.us(shape, sparsity, kernel) / float(self.attention(shape, DENSE)["us"])

    def compression(self, what: str, rule: str) -> list[Row]:
        """The rows with a time."""
        return self._all("compression", lambda row: row["us"], what=what, rule=rule)

    def generation(self, **fields: Any) -> list[Row]:
        """The rows of the model that ran, with a prefill in one piece."""

        def good(row: Row) -> bool:
            return row["status"] == "ok" and not row.get("filled") and not row.get("chunk")

        return self._all("generation", good, shape=MODEL, **fields)

    def beside_dense(self, field: str, sparsity: float, **sizes: Any) -> float:
        """A field of the newest row of these sizes, relative to that of the dense cache; of 256 new tokens."""
        one, dense = (self.generation(sparsity=s, new_tokens=256, **sizes)[-1] for s in (sparsity, 0.0))
        return float(one[field] / dense[field])

    def agreement(self, field: str) -> Any:
        """What agreement.json says."""
        if field not in self._agreement:
            raise MissingError(f"{field!r} in agreement.json")
        return self._agreement[field]

    def _one(self, file: str, good: Callable[[Row], Any], **fields: Any) -> Row:
        return self._all(file, good, **fields)[-1]

    def _all(self, file: str, good: Callable[[Row], Any], **fields: Any) -> list[Row]:
        rows = self._rows[file]
        found = [row for row in rows if all(row.get(name) == value for name, value in fields.items()) and good(row)]
        if not found:
            raise MissingError(
                f"row in {file}.json with {', '.join(f'{name} {value}' for name, value in fields.items())}"
            )
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of a device's results")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        parser.error(f"{folder} is no folder")
    results = Results(folder)
    lines = [bar.line(results) for bar in bars()]
    print("\n".join(lines))
    verdicts = [line.split()[0] for line in lines]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("pass", "FAIL", "missing")))


def bars() -> Iterator[Bar]:
    """All of them."""
    for shape, most in (("A", 0.45), ("B", 0.15)):
        text = f"Triton attention at {shape}, 0.7, relative to the published CUDA kernels on an H100"
        yield Bar(text, most, partial(_of_published, shape=shape))
    yield from _attention_bars()
    for sparsity, most in ((0.7, 0.40), (0.5, 0.58)):
        yield Bar(f"bytes of a cache at {sparsity}, relative to dense", most, partial(_bytes, sparsity=sparsity))
    for rule in RULES:
        text = f"prune and pack a prompt, {rule}: speed relative to copying as many bytes"
        yield Bar(text, 0.70, partial(_copy_speed, rule=rule), at_least=True)
        yield Bar(f"a step's compression, {rule}, relative to its attention", 0.03, partial(_share, rule=rule))
    yield from _generation_bars()
    text = "attention of a model's layers on its own caches, RMS error"
    yield Bar(text, 5e-3, lambda r: float(r.agreement("attention_rms")))
    yield Bar(
        "teacher-forced logits, error relative to its bar", 1.0, lambda r: r.agreement("rms") / r.agreement("bar")
    )
    yield Bar("teacher-forced steps that were compared", 1024, lambda r: len(r.agreement("ratios")), at_least=True)
    yield Bar("greedy tokens differ at ties alone (1: yes)", 1, lambda r: float(r.agreement("greedy")), at_least=True)


def _attention_bars() -> Iterator[Bar]:
    """Attention against dense, linear in tokens, on skewed masks, for groups of query heads; of each kernel."""
    of_dense = {
        "triton": {("A", 0.7): 0.90, ("B", 0.7): 1.05, ("A", 0.5): 1.15, ("B", 0.5): 1.15},
        "mosaic_gpu": {("A", 0.7): 0.67, ("B", 0.7): 0.67, ("A", 0.5): 0.85, ("B", 0.5): 0.85},
    }
    for kernel, name in KERNELS.items():
        for (shape, sparsity), most in of_dense[kernel].items():
            text = f"{name} attention at {shape}, {sparsity}, relative to dense through cuDNN"
            yield Bar(text, most, partial(Results.of_dense, shape=shape, sparsity=sparsity, kernel=kernel))
        text = f"{name} attention, batch 1, 0.7, relative to dense, the worst from 4096 tokens on"
        yield Bar(text, 1.0, partial(_batch_1, kernel=kernel))
        text = f"{name} attention, batch 1: growth of time relative to growth of tokens, the worst from 1024 tokens on"
        yield Bar(text, 1.1, partial(_growth, kernel=kernel))
        for mask in MASKS[1:]:
            text = f"{name} attention, {mask} mask relative to a random one, the worse of A and B"
            yield Bar(text, 1.3, partial(_skew, kernel=kernel, mask=mask))
        text = f"{name} attention, 1, 4 and 8 query heads per KV head at the same bytes: slowest relative to fastest"
        yield Bar(text, 1.15, partial(_spread, kernel=kernel))
    text = "Triton attention, 0.7, centred keys (recommended) relative to plain ones, the worse of A and B"
    yield Bar(text, 1.08, _centred)


def _generation_bars() -> Iterator[Bar]:
    """A whole generation against one with a dense cache."""
    largest = {"context": 16384, "largest": True}
    speeds: list[tuple[str, dict[str, Any], dict[float, float]]] = [
        ("batch 8 at 16384 tokens", {"context": 16384, "batch": 8, "largest": False}, {0.7: 1.15, 0.5: 1.0}),
        ("either's largest batch at 16384 tokens", largest, {0.7: 1.6, 0.5: 1.25}),
        ("batch 1 at 65536 tokens", {"context": 65536, "batch": 1, "largest": False}, {0.7: 1.0, 0.5: 0.95}),
    ]
    for name, sizes, wanted in speeds:
        for sparsity, least in wanted.items():
            text = f"tokens per second at {sparsity}, {name}, relative to dense"
            yield Bar(text, least, _beside_dense("tokens_per_s", sparsity, sizes), at_least=True)
    for sparsity, least in ((0.7, 2.3), (0.5, 1.6)):
        text = f"largest batch at {sparsity}, 16384 tokens, relative to dense"
        yield Bar(text, least, _beside_dense("batch", sparsity, largest), at_least=True)
    for batch in (1, 8):
        text = f"time to the first token at 0.7, batch {batch} at 16384 tokens, relative to dense"
        yield Bar(text, 1.05, _beside_dense("ttft_s", 0.7, {"context": 16384, "batch": batch, "largest": False}))
    text = "bytes in use while decoding, relative to weights and packed caches, the worst at 0.7"
    yield Bar(text, 1.05, lambda r: max(_memory(row) for row in r.generation(sparsity=0.7)))
    yield Bar("largest batches that are as planned within 5 %, share of them", 1.0, _planned, at_least=True)
    text = "step time of 4096 steps, largest deviation from what the growing cache explains"
    yield Bar(text, 0.05, lambda r: float(r.generation(sparsity=0.7, new_tokens=4096)[-1]["flatness"]))
    text = "dense attention in a step, deviation from dense attention alone at B"
    yield Bar(text, 0.10, _dense_in_a_step)


def _of_published(results: Results, shape: str) -> float:
    device = results.attention(shape, "published 0.7, triton")["where"]["device"]
    if "H100" not in device:
        raise MissingError(f"row of an H100 in attention.json; this is of {device}")
    return results.us(shape, 0.7, "triton") / PUBLISHED_KERNELS[shape, 0.7]


def _batch_1(results: Results, kernel: str) -> float:
    return max(results.of_dense(shape.name, 0.7, kernel) for shape in SETS["context"] if shape.tokens >= 4096)


def _growth(results: Results, kernel: str) -> float:
    times = [(shape.tokens, results.us(shape.name, 0.7, kernel)) for shape in SETS["context"]]
    return max((us / us_before) / (n / n_before) for (n_before, us_before), (n, us) in itertools.pairwise(times))


def _skew(results: Results, kernel: str, mask: str) -> float:
    return max(results.us(at, 0.7, kernel, mask) / results.us(at, 0.7, kernel) for at in ("A", "B"))


def _spread(results: Results, kernel: str) -> float:
    times = [results.us(shape, 0.7, kernel) for shape in ("B", "B, group 1", "B, group 8")]
    return max(times) / min(times)


def _centred(results: Results) -> float:
    names = [f"{rule} 0.7, triton" for rule in ("recommended", "published")]
    times = [[results.attention(at, name)["us"] for name in names] for at in ("A", "B")]
    return max(float(centred / plain) for centred, plain in times)


def _bytes(results: Results, sparsity: float) -> float:
    def bytes_of(shape: str, name: str) -> int:
        return int(results.attention(shape, name)["bytes"])

    return max(bytes_of(at, f"published {sparsity}, triton") / bytes_of(at, DENSE) for at in ("A", "B"))


def _copy_speed(results: Results, rule: str) -> float:
    return min(float(row["copy_us"] / row["us"]) for row in results.compression("prompt", rule))


def _share(results: Results, rule: str) -> float:
    return max(float(row["share"]) for row in results.compression("steps", rule))


def _beside_dense(field: str, sparsity: float, sizes: dict[str, Any]) -> Callable[[Results], float]:
    return lambda results: results.beside_dense(field, sparsity, **sizes)


def _memory(row: Row) -> float:
    if "decode_bytes" not in row:
        raise MissingError("'decode_bytes' in generation.json")
    return float(row["decode_bytes"] / (row["weights_bytes"] + row["cache_bytes"]))


def _planned(results: Results) -> float:
    rows = [row for row in results.generation(context=16384, largest=True) if "larger_fits" in row]
    if not rows:
        raise MissingError("'larger_fits' in generation.json")
    return sum(row["planned_batch"] <= 1.05 * row["batch"] and row["larger_fits"] is False for row in rows) / len(rows)


def _dense_in_a_step(results: Results) -> float:
    row = results.generation(sparsity=0.0, context=16384, batch=8, largest=False)[-1]
    if "layer_attention_us" not in row:
        raise MissingError("'layer_attention_us' in generation.json")
    return abs(float(row["layer_attention_us"] / results.attention("B", DENSE)["us"]) - 1)


if __name__ == "__main__":
    main()
