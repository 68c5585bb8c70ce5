"""What `python -m benchmarks.quality_sweep --collect` wrote, as tables and plots read it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mustafar_jax.quality.metrics import bootstrap

Results = dict[str, Any]
Row = dict[str, Any]

MODELS = {"qwen2.5-coder-1.5b.gguf": "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M"}
"""Names of models whose files do not tell them."""


EXAMPLES = {"perplexity": "windows", "needle": "needles", "ruler": "examples of RULER's tasks"}
"""What a test's examples are."""


def conditions(results: Results) -> list[str]:
    """What was measured, on what."""
    counts = {test: len(ids) for test, ids in results["examples"].items()}
    tested = ", ".join(f"{count} {EXAMPLES[test]}" for test, count in counts.items())
    where = results["where"]
    return [
        f"{model(results)}, {results['dtype']}; {tested} of {', '.join(results['data'])}; {where['device']}, "
        f"jax {where['jax']}, commit {where['commit'][:7]}."
    ]


def model(results: Results) -> str:
    """The model's name."""
    name: str = results["model"]
    return MODELS.get(name, name)


def measured(results: Results, test: str) -> list[Row]:
    """The caches that have scores in a test."""
    return [row for row in results["rows"] if test in row["tests"]]


def label(row: Row) -> str:
    """A cache by its rule, what that compresses, and how much it removes where its name says so."""
    return " ".join(filter(None, [row["rule"], row["pruned"], *_sparsity(row)]))


def short_label(row: Row) -> str:
    """The same, without what is compressed."""
    return " ".join([row["rule"], *_sparsity(row)])


def _sparsity(row: Row) -> list[str]:
    """Presets have their sparsity by name."""
    largest = f"{max(row['sparsity']):g}" if row["sparsity"] else "0"
    return [largest] if largest != "0" and row["name"].endswith(f"-{largest}") else []


def interval(scores: Sequence[float], digits: int) -> str:
    """A mean and its 95 % interval."""
    found = bootstrap(scores)
    return f"{found['mean']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def cell(row: Row, test: str, name: str, digits: int) -> str:
    """A score's mean and its 95 % interval."""
    if test not in row["tests"]:
        return "not measured"
    if row["rule"] == "dense" and name in ("increase", "kl"):
        return "0"
    return interval(row["tests"][test]["scores"][name], digits)


def kl(row: Row) -> float:
    """The mean divergence from dense on texts."""
    return float(np.mean(row["tests"]["perplexity"]["scores"]["kl"]))


def held(row: Row, test: str = "perplexity") -> float:
    """Bytes of a whole cache at the test's longest text, as a share of a dense one's."""
    found = row["tests"][test]["bytes"]
    return float(found["held"] / found["dense"])


def mean_bits(row: Row) -> float:
    """Bits of an entry, of packed keys and values alike."""
    return float(np.mean(row["bits"]))


def has_bits(results: Results) -> bool:
    """Whether caches say how many bits an entry takes: those of formats do."""
    return all("bits" in row for row in results["rows"])


def has_longer_window(row: Row) -> bool:
    """Whether more tokens stay dense than 4 sinks and 32 to 63 recent ones."""
    sinks, recent = (_field(row, name) for name in ("sink_tokens", "residual_length"))
    return sinks > 4 or recent > 32


def _field(row: Row, name: str) -> int:
    """An integer field of the cache's config."""
    found = re.search(rf"\b{name}=(\d+)", row["kind"])
    assert found is not None, row["kind"]
    return int(found[1])


def lines_of(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [_line(header), "|---" * len(header) + "|", *map(_line, cells)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
