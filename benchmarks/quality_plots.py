"""Plots of a sweep: divergence from dense against bytes and bits. Below and to the left is better."""

import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.quality_results import (
    Results,
    Row,
    conditions,
    has_bits,
    has_longer_window,
    held,
    label,
    mean_bits,
    measured,
)
from mustafar_jax.config import PRESETS
from mustafar_jax.quality.metrics import bootstrap

BYTES = "bytes held, % of dense"
KL = "mean KL to dense, nats per token"


def draw(results: Results, file: pathlib.Path) -> None:
    """The plots of a results file, beside it: FILE.png where caches have no bits, FILE_frontier.png of all."""
    frontier_file = file.with_name(f"{file.stem}_frontier.png")
    if not measured(results, "perplexity"):
        return
    if has_bits(results):
        plot_formats(results, frontier_file)
    else:
        plot(results, file.with_suffix(".png"))
        plot_frontier(results, frontier_file)


def plot_formats(results: Results, file: pathlib.Path) -> None:
    """Of each family of formats, divergence against bits of an entry, and against bytes of whole caches."""
    rows = [row for row in measured(results, "perplexity") if row["pruned"] == "K+V"]
    figure, axes = _panels(["bits of an entry, mean of keys and values", BYTES], results)
    _draw_families(axes[0], [row for row in rows if not has_longer_window(row)], mean_bits, _BITS)
    _draw_families(axes[1], rows, _percent, _PERCENTS)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=100)


_BITS = 2, 3, 4, 5, 6, 8, 10
_PERCENTS = 15, 20, 25, 30, 40, 50, 60


def _draw_families(axis: Any, rows: Sequence[Row], size: Callable[[Row], float], ticks: Sequence[int]) -> None:
    """Every cache with its interval; of each family, and of all (dotted), a line through what no other beats."""
    points = {row["name"]: (size(row), *_spread(row, "kl")) for row in rows}
    for (name, longer), look in _LOOKS.items():
        found = [points[row["name"]] for row in rows if (family(row), has_longer_window(row)) == (name, longer)]
        if found:
            _draw_family(axis, found, f"{name}, longer dense windows" if longer else name, look)
    best = frontier((x, y) for x, y, _, _ in points.values())
    axis.plot(*zip(*best, strict=True), color="gray", linestyle=":", zorder=0)
    for row in rows:
        if row["rule"] in PRESETS and row["rule"] != "published":
            axis.annotate(row["rule"], points[row["name"]][:2], (4, 4), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", ylabel=KL)
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()


def _draw_family(axis: Any, points: Sequence[tuple[float, ...]], name: str, look: dict[str, Any]) -> None:
    size, mean, low, high = np.array(points).T
    axis.errorbar(size, mean, yerr=[mean - low, high - mean], linestyle="", capsize=2, label=name, **look)
    axis.plot(*zip(*frontier(zip(size, mean, strict=True)), strict=True), color=look["color"], linewidth=1)


FAMILIES = {
    "rotated codes": "o",
    "rotated codes, not centred": "P",
    "pruned keys with codes": "s",
    "pruned keys and values with codes": "X",
    "KIVI": "D",
    "recommended": "^",
    "published": "v",
}
"""What is drawn in one colour, and its marker."""

_LOOKS = {
    (name, longer): {"color": f"C{index}", "marker": marker, "fillstyle": "none" if longer else "full"}
    for longer in (False, True)
    for index, (name, marker) in enumerate(FAMILIES.items())
}


def family(row: Row) -> str:
    """The one of `FAMILIES` that a cache is of."""
    named = re.match(r"KIVI|recommended|published", row["rule"])
    return named[0] if named else _family_of_codes(row)


def _family_of_codes(row: Row) -> str:
    keys, values = row["sparsity"]
    if keys:
        return "pruned keys and values with codes" if values else "pruned keys with codes"
    return "rotated codes, not centred" if "not centred" in row["rule"] else "rotated codes"


def plot(results: Results, file: pathlib.Path) -> None:
    """Divergence from dense against bytes held, of each rule."""
    rows = [row for row in measured(results, "perplexity") if row["rule"] != "dense"]
    panels = [pruned for pruned in ("K", "V", "K+V") if any(row["pruned"] == pruned for row in rows)]
    figure, axes = _panels([BYTES] * len(panels), results)
    for axis, pruned in zip(axes, panels, strict=True):
        alike = [row for row in rows if row["pruned"] == pruned]
        for rule in dict.fromkeys(map(_rule, alike)):
            points = [_point(row, "kl") for row in alike if _rule(row) == rule]
            size, mean, low, high = np.array(sorted(points)).T
            axis.errorbar(size, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=rule)
        axis.set(yscale="log", title=f"{pruned} compressed", ylabel=KL)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(file, dpi=100)


def _rule(row: Row) -> str:
    return re.sub(r"^int\d$", "quantised (int2, int3, int4)", row["rule"])


def plot_frontier(results: Results, file: pathlib.Path) -> None:
    """Loss over dense, and divergence from it, against bytes held: what no other cache beats in both is joined."""
    rows = [row for row in measured(results, "perplexity") if row["pruned"] == "K+V"]
    figure, axes = _panels([BYTES] * 2, results)
    looks = [{"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5]} for i in range(len(rows))]
    for axis, (name, title) in zip(axes, {"increase": "loss over dense", "kl": "KL to dense"}.items(), strict=True):
        points = [_point(row, name) for row in rows]
        for row, look, (size, mean, low, high) in zip(rows, looks, points, strict=True):
            spread, rule = [[mean - low], [high - mean]], label(row).replace(" K+V", "")
            axis.errorbar(size, mean, yerr=spread, linestyle="", capsize=3, label=rule, **look)
        best = frontier((size, mean) for size, mean, _, _ in points)
        axis.plot(*zip(*best, strict=True), color="gray", linestyle=":", zorder=0)
        axis.set_ylabel(f"mean {title}, nats per token")
    axes[0].set_yscale("symlog", linthresh=0.01)  # a loss may lie below dense's
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, dpi=100)


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of which no other is as small in both numbers, by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _panels(sizes: Sequence[str], results: Results) -> tuple[Any, Any]:
    """A figure and its axes, side by side, against what `sizes` says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(sizes), 5.5), layout="constrained")
    axes = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axis, size in zip(axes, sizes, strict=True):
        axis.set_xlabel(size)
        axis.grid(alpha=0.3)
    figure.suptitle(conditions(results)[0] + " Bars: 95 % intervals.", fontsize=8)
    return figure, axes


def _point(row: Row, score: str) -> tuple[float, float, float, float]:
    """Bytes held, % of dense; a score's mean and its interval."""
    return _percent(row), *_spread(row, score)


def _percent(row: Row) -> float:
    return 100 * held(row)


def _spread(row: Row, score: str) -> tuple[float, float, float]:
    """A score's mean and its interval."""
    found = bootstrap(row["tests"]["perplexity"]["scores"][score])
    return found["mean"], found["low"], found["high"]
