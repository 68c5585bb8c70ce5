"""Tables and plots of what `python -m benchmarks.quality_sweep` measured.

    python -m benchmarks.quality_report benchmarks/results/DEVICE/quality/sweep.json --docs docs/quality.md

Writes the plots beside the results, and the tables into the document, between the lines `<!-- NAME: FILE -->` and
`<!-- end -->`, where NAME is one of `TABLES` and FILE the results' path from the document's folder. Every mean has its
95 % interval, by bootstrap over windows or needles.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mustafar_jax.quality.metrics import bootstrap

Results = dict[str, Any]
Row = dict[str, Any]

COMPARISONS = [
    ("ThinK-K-0.5", "magnitude-K-0.5"),
    ("ThinK-K-0.7", "magnitude-K-0.7"),
    ("ThinK-V-0.5", "magnitude-V-0.5"),
    ("ThinK-V-0.7", "magnitude-V-0.7"),
    ("2-4-K-0.5", "magnitude-K-0.5"),
    ("2-4-V-0.5", "magnitude-V-0.5"),
    ("output-aware-K-0.5", "magnitude-K-0.5"),
    ("output-aware-K-0.7", "magnitude-K-0.7"),
    ("channel-magnitude-V-0.5", "magnitude-V-0.5"),
    ("channel-output-aware-V-0.5", "magnitude-V-0.5"),
    ("channel-magnitude-V-0.7", "magnitude-V-0.7"),
    ("channel-output-aware-V-0.7", "magnitude-V-0.7"),
    ("recommended-K-V-0.5", "magnitude-K-V-0.5"),
    ("recommended-K-V-0.7", "magnitude-K-V-0.7"),
    ("recommended-unweighed-K-V-0.5", "magnitude-K-V-0.5"),
    ("recommended-unweighed-K-V-0.7", "magnitude-K-V-0.7"),
    *((f"recommended-K-V-{sparsity}", f"recommended-unweighed-K-V-{sparsity}") for sparsity in (0.5, 0.7, 0.75)),
    ("recommended-output-aware-K-V-0.7", "magnitude-K-V-0.7"),
    ("recommended-output-aware-K-V-0.7", "recommended-K-V-0.7"),
    ("recommended-K-V-0.75", "magnitude-K-V-0.7"),
    ("recommended-unweighed-K-V-0.75", "magnitude-K-V-0.7"),
    ("recommended-output-aware-K-V-0.75", "magnitude-K-V-0.7"),
    ("recommended-13-of-64-K-V-0.75", "magnitude-19-of-64-K-V-0.7"),
    ("recommended-unweighed-13-of-64-K-V-0.75", "magnitude-19-of-64-K-V-0.7"),
    ("recommended-output-aware-13-of-64-K-V-0.75", "magnitude-19-of-64-K-V-0.7"),
    ("int2-K-V-0", "magnitude-K-V-0.7"),
]
"""Pairs of caches whose divergences from dense are compared window by window, where both were measured."""


def caches_table(results: Results) -> list[str]:
    """A line for each cache: bytes, loss and divergence from dense on texts, and needles."""
    lines = [
        "| rule | of | true sparsity | bytes of dense | at the masks' own count (not held) | loss over dense, nats "
        "| KL to dense, nats | median window's KL | needle: probability of a token | needle: all tokens likeliest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = [row["rule"], row["pruned"], _sparsity(row), *_bytes(row)]
        cells += [_cell(row, "perplexity", name, 4) for name in ("increase", "kl")] + [_median(row)]
        cells += [_cell(row, "needle", name, 3) for name in ("probability", "exact")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comparisons_table(results: Results) -> list[str]:
    """The ratio of two caches' mean divergences from dense on the same windows: of all, of each text, by window."""
    rows = {row["name"]: row for row in results["rows"] if "perplexity" in row["tests"]}
    texts = np.asarray(results["groups"]["perplexity"])
    names = list(dict.fromkeys(texts.tolist()))
    lines = [
        "| " + " | ".join(["cache", "against", "ratio of mean KL", *names, "median window's ratio"]) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    for name, other in COMPARISONS:
        if name in rows and other in rows:
            a, b = (np.asarray(rows[each]["tests"]["perplexity"]["scores"]["kl"]) for each in (name, other))
            low, middle, high = _ratio(a, b)
            cells = [_label(rows[name]), _label(rows[other]), f"{middle:.2f} ({low:.2f} to {high:.2f})"]
            cells += [f"{a[texts == text].mean() / b[texts == text].mean():.2f}" for text in names]
            lines.append("| " + " | ".join([*cells, f"{np.median(a / b):.2f}"]) + " |")
    return lines


def conditions(results: Results) -> list[str]:
    """What was measured, on what."""
    counts = {test: len(ids) for test, ids in results["examples"].items()}
    tested = ", ".join(f"{count} {'windows' if test == 'perplexity' else 'needles'}" for test, count in counts.items())
    where = results["where"]
    return [
        f"{results['model']}, {results['dtype']}; {tested} of {', '.join(results['data'])}; {where['device']}, "
        f"jax {where['jax']}, commit {where['commit'][:7]}."
    ]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "conditions": conditions,
    "caches": caches_table,
    "comparisons": comparisons_table,
}


def main() -> None:
    """Draw, and fill the document."""
    options = _parser().parse_args()
    for file in options.results:
        results = json.loads(file.read_text(encoding="utf-8"))
        plot(results, file.with_suffix(".png"))
        plot_frontier(results, file.with_name(f"{file.stem}_frontier.png"))
    text = options.docs.read_text(encoding="utf-8")
    options.docs.write_text(fill(text, options.docs.parent), encoding="utf-8")


def fill(text: str, folder: pathlib.Path) -> str:
    """A document with its tables made anew; paths in it are taken from `folder`.

    Raises:
        ValueError: a marked table of another name than those in `TABLES`.
    """

    def replace(found: re.Match[str]) -> str:
        name, file = found["name"], folder / found["file"]
        if name not in TABLES:
            raise ValueError(f"<!-- {name}: ... --> names no table; wanted one of {sorted(TABLES)}")
        lines = TABLES[name](json.loads(file.read_text(encoding="utf-8")))
        return "\n".join([found["begin"], *lines, "<!-- end -->"])

    marked = r"(?P<begin><!-- (?P<name>[\w-]+): (?P<file>\S+) -->)\n.*?<!-- end -->"
    return re.sub(marked, replace, text, flags=re.DOTALL)


def plot(results: Results, file: pathlib.Path) -> None:
    """Divergence from dense against bytes held, of each rule: below and to the left is better."""
    rows = [row for row in results["rows"] if "perplexity" in row["tests"] and row["rule"] != "dense"]
    panels = [pruned for pruned in ("K", "V", "K+V") if any(row["pruned"] == pruned for row in rows)]
    figure, axes = _panels(len(panels), results)
    for axis, pruned in zip(axes, panels, strict=True):
        alike = [row for row in rows if row["pruned"] == pruned]
        for family in dict.fromkeys(map(_family, alike)):
            points = [_point(row, "kl") for row in alike if _family(row) == family]
            held, mean, low, high = np.array(sorted(points)).T
            axis.errorbar(held, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=family)
        axis.set(yscale="log", title=f"{pruned} compressed", ylabel="mean KL to dense, nats per token")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(file, dpi=100)


def _family(row: Row) -> str:
    return re.sub(r"^int\d$", "quantised (int2, int3, int4)", row["rule"])


def plot_frontier(results: Results, file: pathlib.Path) -> None:
    """Loss over dense, and divergence from it, against bytes held: what no other cache beats in both is joined."""
    rows = [row for row in results["rows"] if "perplexity" in row["tests"] and row["pruned"] == "K+V"]
    figure, axes = _panels(2, results)
    looks = [{"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5]} for i in range(len(rows))]
    for axis, (name, label) in zip(axes, {"increase": "loss over dense", "kl": "KL to dense"}.items(), strict=True):
        points = [_point(row, name) for row in rows]
        for row, look, (held, mean, low, high) in zip(rows, looks, points, strict=True):
            spread, rule = [[mean - low], [high - mean]], _label(row).replace(" K+V", "")
            axis.errorbar(held, mean, yerr=spread, linestyle="", capsize=3, label=rule, **look)
        best = frontier([(held, mean) for held, mean, _, _ in points])
        axis.plot(*zip(*best, strict=True), color="gray", linestyle=":", zorder=0)
        axis.set_ylabel(f"mean {label}, nats per token")
    axes[0].set_yscale("symlog", linthresh=0.01)  # a loss may lie below dense's
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=100)


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of which no other is as small in both numbers, by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _panels(count: int, results: Results) -> tuple[Any, Any]:
    """A figure and its axes, side by side, against bytes held."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 5.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.set_xlabel("bytes held, % of dense")
        axis.grid(alpha=0.3)
    figure.suptitle(conditions(results)[0] + " Bars: 95 % intervals.", fontsize=8)
    return figure, axes


def _point(row: Row, score: str) -> tuple[float, float, float, float]:
    """Bytes held, % of dense; a score's mean and its interval."""
    test = row["tests"]["perplexity"]
    found = bootstrap(test["scores"][score])
    return 100 * test["bytes"]["held"] / test["bytes"]["dense"], found["mean"], found["low"], found["high"]


def _ratio(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """The ratio of two means over the same examples with its 95 % interval: low, value, high."""
    picks = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    low, high = np.quantile(a[picks].mean(axis=1) / b[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(a.mean() / b.mean()), float(high)


def _cell(row: Row, test: str, name: str, digits: int) -> str:
    if test not in row["tests"]:
        return "not measured"
    if row["rule"] == "dense" and name in ("increase", "kl"):
        return "0"
    found = bootstrap(row["tests"][test]["scores"][name])
    return f"{found['mean']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def _median(row: Row) -> str:
    if "perplexity" not in row["tests"]:
        return "not measured"
    return f"{np.median(row['tests']['perplexity']['scores']['kl']):.4f}"


def _sparsity(row: Row) -> str:
    if row["true_sparsity"] is None:
        return ""
    keys, values = row["true_sparsity"]
    return {"K": f"{keys:.4g}", "V": f"{values:.4g}", "K+V": f"{keys:.4g}, {values:.4g}"}.get(row["pruned"], "")


def _bytes(row: Row) -> list[str]:
    """Held, and at the masks' own count where that differs, as shares of a dense cache's."""
    test = row["tests"].get("perplexity") or row["tests"]["needle"]
    held, own, dense = (test["bytes"][name] for name in ("held", "own_count", "dense"))
    return [f"{held / dense:.1%}", "" if own == held else f"{own / dense:.1%}"]


def _label(row: Row) -> str:
    sparsity = max(row["sparsity"]) if row["sparsity"] else 0
    return " ".join([row["rule"], row["pruned"], *([f"{sparsity:g}"] if sparsity else [])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="what quality_sweep --collect wrote")
    parser.add_argument("--docs", type=pathlib.Path, required=True, help="the document to fill")
    return parser


if __name__ == "__main__":
    main()
