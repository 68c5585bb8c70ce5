"""Tables of a sweep of formats: bits and bytes of caches, what they lose on texts, and what needles they find."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import mustafar_jax as mj
from benchmarks.quality_results import (
    Results,
    Row,
    cell,
    held,
    interval,
    kl,
    label,
    lines_of,
    mean_bits,
    measured,
    model,
    short_label,
)
from mustafar_jax.quality.quantised import Quantised

SIDES = {"K": [0], "V": [1], "K+V": [0, 1]}
"""Of the bits of keys and of values, those that a cache compresses."""

EQUAL = 1.005
"""Bytes that differ by less than half a percent count as equal: mean keys and weights of channels are about that."""

NAMED = {
    "fast": mj.CompressionConfig.preset("fast"),
    "balanced": mj.CompressionConfig.preset("balanced"),
    "small": mj.CompressionConfig.preset("small"),
    "recommended 0.5": mj.CompressionConfig.recommended(0.5, 0.5),
    "recommended 0.7": mj.CompressionConfig.recommended(0.7, 0.7),
    "published 0.5": mj.CompressionConfig(0.5, 0.5),
    "published 0.7": mj.CompressionConfig(0.7, 0.7),
    "KIVI-4": Quantised(bits=4, sink_tokens=4),
    "KIVI-3": Quantised(bits=3, sink_tokens=4),
    "KIVI-2": Quantised(bits=2, sink_tokens=4),
}
"""What a reader chooses among, by `short_label`: presets, and their neighbours."""


def keys_table(results: Results) -> list[str]:
    """Caches that compress keys alone."""
    return _formats(results, "K")


def values_table(results: Results) -> list[str]:
    """Caches that compress values alone."""
    return _formats(results, "V")


def both_table(results: Results) -> list[str]:
    """Caches that compress both."""
    return _formats(results, "K+V")


def _formats(results: Results, pruned: str) -> list[str]:
    """A line for each cache, by bits: what it takes, what it loses, and whether another is ahead of it."""
    rows = sorted(_compressing(results, pruned), key=lambda row: (-mean_bits(row), kl(row)))
    texts = np.asarray(results["groups"]["perplexity"])
    names = list(dict.fromkeys(texts.tolist()))
    header = ["cache", *(f"bits of {('keys', 'values')[side]}" for side in SIDES[pruned])]
    header += [f"bytes of dense, {_capacity(results):,} tokens", "loss over dense, nats", "mean KL to dense, nats"]
    header += [*(f"KL, {name}" for name in names), "ahead of it"]
    return lines_of(header, [_format(row, rows, texts, names) for row in rows])


def _format(row: Row, rows: Sequence[Row], texts: np.ndarray, names: Sequence[str]) -> list[str]:
    scores = np.asarray(row["tests"]["perplexity"]["scores"]["kl"])
    cells = [short_label(row), *(f"{row['bits'][side]:.4g}" for side in SIDES[row["pruned"]]), f"{held(row):.1%}"]
    cells += [cell(row, "perplexity", name, 4) for name in ("increase", "kl")]
    return [*cells, *(f"{scores[texts == name].mean():.4f}" for name in names), ahead(row, rows)]


def ahead(row: Row, rows: Sequence[Row]) -> str:
    """The cache that is closest to dense of those that are closer than this one and take no more bytes, or ""."""
    better = [other for other in rows if kl(other) < kl(row) and held(other) <= held(row) * EQUAL]
    return short_label(min(better, key=kl)) if better else ""


def _compressing(results: Results, pruned: str) -> list[Row]:
    return [row for row in measured(results, "perplexity") if row["pruned"] == pruned]


def _capacity(results: Results, test: str = "perplexity") -> int:
    """Tokens that a test's caches have room for."""
    return max(row["tests"][test]["bytes"]["capacity"] for row in measured(results, test))


def presets_table(*several: Results) -> list[str]:
    """The caches of `NAMED` in several sweeps beside each other: whole caches' bytes, loss and KL."""
    found = [{short_label(row): row for row in _compressing(results, "K+V")} for results in several]
    header = ["cache"]
    for results in several:
        test = f"{model(results)}, {_capacity(results):,} tokens"
        header += [f"{test}: bytes of dense", "loss over dense, nats", "mean KL to dense, nats"]
    names = [name for name in NAMED if any(name in rows for rows in found)]
    return lines_of(header, [[name, *(text for rows in found for text in _cost(rows.get(name)))] for name in names])


def _cost(row: Row | None) -> list[str]:
    if row is None:
        return ["not measured"] * 3
    return [f"{held(row):.1%}", *(cell(row, "perplexity", name, 4) for name in ("increase", "kl"))]


def needles_table(results: Results) -> list[str]:
    """A line for each cache, by bits: of how many needles all tokens are the likeliest, by length and together."""
    return _by_length(results, "needle", "exact")


def ruler_table(results: Results) -> list[str]:
    """A line for each cache, by bits: RULER's score, the mean over examples, by length and together."""
    return _by_length(results, "ruler", "score")


def _by_length(results: Results, test: str, name: str) -> list[str]:
    """Means of a test's score; the examples' groups end in their lengths."""
    rows = sorted(measured(results, test), key=lambda row: -mean_bits(row))
    found = {row["name"]: np.asarray(row["tests"][test]["scores"][name]) for row in rows}
    dense = next((found[row["name"]] for row in rows if row["rule"] == "dense"), None)
    lengths = np.asarray([int(group.split()[-1]) for group in results["groups"][test]])
    header = ["cache", f"bytes of dense, {_capacity(results, test):,} tokens"]
    header += [*(f"{length:,} tokens" for length in np.unique(lengths)), "all", "more than dense (paired)"]
    cells = []
    for row in rows:
        scores = found[row["name"]]
        means = [f"{scores[lengths == length].mean():.3f}" for length in np.unique(lengths)]
        line = [label(row), f"{held(row, test):.1%}", *means, interval(scores.tolist(), 3)]
        cells.append([*line, _beside(scores, dense)])
    return lines_of(header, cells)


def _beside(scores: np.ndarray, dense: np.ndarray | None) -> str:
    """The mean difference from dense, example by example."""
    if dense is None:
        return "not measured"
    return "" if scores is dense else interval((scores - dense).tolist(), 3)


def preset_bytes_table() -> list[str]:
    """What whole caches of `NAMED` take, computed from their configs: bits of an entry, and bytes of two lengths."""
    header = ["cache"]
    for head_dim in _HEAD_DIMS:
        header += [f"head_dim {head_dim}: bits of keys, of values", *(f"{length:,} tokens" for length in _LENGTHS)]
    return lines_of(header, [[name, *_sizes(config)] for name, config in NAMED.items()])


_HEAD_DIMS = 128, 64
_LENGTHS = 2048, 16384


def _sizes(config: mj.CompressionConfig) -> list[str]:
    cells = []
    for head_dim in _HEAD_DIMS:
        cells.append(", ".join(f"{bits:.4g}" for bits in config.entry_bits(head_dim)))
        cells += [f"{_share(config, head_dim, length):.1%}" for length in _LENGTHS]
    return cells


def _share(config: mj.CompressionConfig, head_dim: int, length: int) -> float:
    """Of a dense cache's bytes, what a bfloat16 one of a sequence takes."""
    init = functools.partial(mj.LayerCache.init, config, batch=1, capacity=length, num_kv_heads=8, head_dim=head_dim)
    cache = jax.eval_shape(functools.partial(init, dtype=jnp.bfloat16, inv_freq=np.ones(head_dim // 2)))
    return float(cache.nbytes / cache.dense_nbytes)
