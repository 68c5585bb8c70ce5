"""Plots of `benchmarks.attention`'s rows; nothing is drawn where matplotlib is not installed."""

import pathlib
import re
from collections.abc import Iterable
from typing import Any

from benchmarks.attention_cases import RULES, SETS
from benchmarks.table import Row


def dense_times(rows: Iterable[Row], shape: str) -> dict[str, float]:
    """Microseconds of dense attention at a shape, by name, cuDNN's through `jax.nn` first."""
    times = {row["name"]: row["us"] for row in rows if row["shape"] == shape and row["rule"] == "dense" and row["us"]}
    return dict(sorted(times.items(), key=lambda time: time[0] != "dense, cuDNN"))


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Time at A and B, and against context length, batch and sparsity, with byte limits; what has been measured."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    drawn = [row for row in rows if row["us"] and row["mask"] == "random"]
    panels = {title: panel for title, panel in _panels(drawn).items() if panel[1]}
    bars = [row for row in rows if row["us"] and row["shape"] in ("A", "B")]
    figure, axes = pyplot.subplots(1, len(panels) + bool(bars) or 1, figsize=(7 + 5 * len(panels), 5), squeeze=False)
    free = list(axes[0])
    if bars:
        _draw_bars(free.pop(0), bars)
    for axis, (title, (x, panel)) in zip(free, panels.items(), strict=False):
        _draw_lines(axis, panel, x)
        axis.set_xlabel(title)
        axis.legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_ratios(rows: list[Row], path: pathlib.Path) -> None:
    """Time relative to dense attention through cuDNN at 0.7, of each shape's fastest kernel by rule."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    timed = [row for row in rows if row["us"] and row["mask"] == "random"]
    dense = {row["shape"]: row["us"] for row in timed if row["name"] == "dense, cuDNN"}
    ratios: dict[str, dict[str, float]] = {rule: {} for rule in RULES}
    for row in timed:
        if row["sparsity"] == 0.7 and row["shape"] in dense:
            of_rule, ratio = ratios[row["rule"]], row["us"] / dense[row["shape"]]
            of_rule[row["shape"]] = min(ratio, of_rule.get(row["shape"], ratio))
    names = [shape.name for shapes in SETS.values() for shape in shapes]
    shapes = [name for name in names if name in dense and name in ratios["published"]]
    if not shapes:
        return
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for i, (rule, of_rule) in enumerate(ratios.items()):
        places = [place + 0.4 * i - 0.2 for place in range(len(shapes))]
        axes.bar(places, [of_rule.get(shape, 0) for shape in shapes], 0.38, label=f"{rule} rule, 0.7")
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="dense, cuDNN")
    axes.set_xticks(range(len(shapes)), [re.sub(", | (?=x )", "\n", shape) for shape in shapes], fontsize="small")
    axes.set(ylabel="time of attention, relative to dense", xlabel="batch x tokens; A, B, C: docs/kernels.md")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panels(rows: list[Row]) -> dict[str, tuple[str, list[Row]]]:
    """By title: what is on the x axis, and the rows."""

    def of_set(name: str) -> list[Row]:
        names = {shape.name for shape in SETS[name]}
        return [row for row in rows if row["shape"] in names]

    panels = {
        "tokens (batch 1, 8 KV heads, 32 query heads)": ("tokens", of_set("context")),
        "batch (8192 tokens, 8 KV heads, 32 query heads)": ("batch", of_set("batch")),
    }
    for name in ("A", "B"):
        panels[f"sparsity (shape {name})"] = (
            "sparsity",
            [row for row in of_set(name) if row["rule"] in ("dense", *RULES)],
        )
    return panels


def _draw_bars(axis: Any, rows: list[Row]) -> None:
    axis.barh([f"{row['shape']}: {row['name']}" for row in rows], [row["us"] for row in rows])
    limits = [row["limit_us"] for row in rows]
    axis.scatter(limits, range(len(rows)), color="black", marker="|", zorder=3, label="byte limit")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize="x-small")
    axis.set_xlabel("microseconds")
    axis.legend(fontsize="x-small")


def _draw_lines(axis: Any, rows: list[Row], x: str) -> None:
    """A line for each rule and implementation (and sparsity, unless that is the axis), dotted its byte limit."""
    for name, line in lines(rows, x).items():
        if x == "sparsity" and line[0]["rule"] == "dense":
            axis.axhline(line[0]["us"], linestyle="--", color="black", linewidth=0.8)
            axis.annotate(name, (0.02, line[0]["us"]), xycoords=("axes fraction", "data"), fontsize="x-small")
            continue
        [drawn] = axis.plot([row[x] for row in line], [row["us"] for row in line], "o-", label=name)
        axis.plot([row[x] for row in line], [row["limit_us"] for row in line], ":", color=drawn.get_color())
    if x != "sparsity":
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axis.set_ylabel("microseconds (dotted: byte limit)")


def lines(rows: list[Row], x: str) -> dict[str, list[Row]]:
    """Rows of each line of a plot, by its name, in the order of x."""
    named: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        by_sparsity = x == "sparsity" and row["rule"] != "dense"
        named.setdefault(f"{row['rule']}, {row['implementation']}" if by_sparsity else row["name"], []).append(row)
    return named


def plot_roofline(rows: list[Row], path: pathlib.Path) -> None:
    """Time against the bytes that a cache holds, with the time that copying as many takes."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    timed = [row for row in rows if row["us"] and row["mask"] == "random"]
    if not timed:
        return
    figure, axis = pyplot.subplots(figsize=(8, 5))
    axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)  # more lines than ten
    for name in dict.fromkeys(row["name"] for row in timed):
        points = sorted((row["bytes"] / 1e6, row["us"]) for row in timed if row["name"] == name)
        axis.plot(*zip(*points, strict=True), "o", markersize=4, label=name)
    ends = [min(row["bytes"] for row in timed), max(row["bytes"] for row in timed)]
    speed = max(row["copy_bytes_per_s"] for row in timed)
    axis.plot(
        [end / 1e6 for end in ends], [end / speed * 1e6 for end in ends], color="black", label="copying the bytes"
    )
    axis.set(xscale="log", yscale="log", xlabel="MB that the cache holds", ylabel="microseconds of attention")
    axis.legend(fontsize="xx-small", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
