"""A generation's row in a line beside the dense one, and the plots of all rows."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks.generation_cases import Case, case_of, setting
from benchmarks.generation_measure import SCOPES


def describe_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row in one line, beside the dense one where there is one."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    text = f"{row['tokens_per_s']:.1f} tokens/s"
    text += f", first token {row['ttft_s']:.2f} s" if "ttft_s" in row else ""  # where there was a prefill
    text += f", step {row['step_ms']:.2f} ms"
    if row.get("flatness") is not None:
        text += f", within {row['flatness']:.1%} of a straight line"
    if "rest_ms" in row:
        text += " (" + ", ".join(f"{part} {row[f'{part}_ms']:.2f}" for part in SCOPES.values()) + ")"
    if "decode_bytes" in row:
        text += f", peak {row['peak_bytes'] / 1e9:.1f} GB, decoding {row['decode_bytes'] / 1e9:.1f} GB"
    if dense := dense_beside(row, rows):
        text += f"; {row['tokens_per_s'] / dense['tokens_per_s']:.2f} of dense tokens/s"
        text += f", {row['ttft_s'] / dense['ttft_s']:.2f} of its time to the first token" if "ttft_s" in row else ""
        text += f", {row['batch'] / dense['batch']:.2f} of its batch" if row["largest"] else ""
    return text


def dense_beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the same case with a dense cache, if it ran; for the largest batch, dense's own largest."""
    same = [r for r in rows if case_of(r).is_dense and r["status"] == "ok" and setting(r) == setting(row)]
    return same[-1] if same and not case_of(row).is_dense else None


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
