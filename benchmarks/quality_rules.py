"""Tables of a sweep of pruning rules."""

import numpy as np

from benchmarks.quality_results import Results, Row, cell, held, label, lines_of, measured

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
    header = ["rule", "of", "true sparsity", "bytes of dense", "at the masks' own count (not held)"]
    header += ["loss over dense, nats", "KL to dense, nats", "median window's KL"]
    header += ["needle: probability of a token", "needle: all tokens likeliest"]
    return lines_of(header, [_cache(row) for row in results["rows"]])


def _cache(row: Row) -> list[str]:
    cells = [row["rule"], row["pruned"], _sparsity(row), *_bytes(row)]
    cells += [cell(row, "perplexity", name, 4) for name in ("increase", "kl")] + [_median(row)]
    return cells + [cell(row, "needle", name, 3) for name in ("probability", "exact")]


def comparisons_table(results: Results) -> list[str]:
    """The ratio of two caches' mean divergences from dense on the same windows: of all, of each text, by window."""
    rows = {row["name"]: row for row in measured(results, "perplexity")}
    texts = np.asarray(results["groups"]["perplexity"])
    names = list(dict.fromkeys(texts.tolist()))
    cells = [
        _comparison(rows[name], rows[other], texts, names)
        for name, other in COMPARISONS
        if name in rows and other in rows
    ]
    return lines_of(["cache", "against", "ratio of mean KL", *names, "median window's ratio"], cells)


def _comparison(row: Row, other: Row, texts: np.ndarray, names: list[str]) -> list[str]:
    a, b = (np.asarray(each["tests"]["perplexity"]["scores"]["kl"]) for each in (row, other))
    low, middle, high = _ratio(a, b)
    cells = [label(row), label(other), f"{middle:.2f} ({low:.2f} to {high:.2f})"]
    cells += [f"{a[texts == text].mean() / b[texts == text].mean():.2f}" for text in names]
    return [*cells, f"{np.median(a / b):.2f}"]


def _ratio(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """The ratio of two means over the same examples with its 95 % interval: low, value, high."""
    picks = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    low, high = np.quantile(a[picks].mean(axis=1) / b[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(a.mean() / b.mean()), float(high)


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
    test = "perplexity" if "perplexity" in row["tests"] else "needle"
    found = row["tests"][test]["bytes"]
    same = found["own_count"] == found["held"]
    return [f"{held(row, test):.1%}", "" if same else f"{found['own_count'] / found['dense']:.1%}"]
