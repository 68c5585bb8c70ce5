"""How much likelihood a compressed cache costs: teacher-forced text after a long prompt, against the dense cache.

    python -m benchmarks.likelihood --model MODEL --text FILE [FILE ...]

Windows of prompt + continuation are taken evenly from each text. A window's prompt is prefilled, so its cache is pruned
and packed; then the continuation's tokens are appended one by one, and the mean negative log-likelihood of each is
compared with the dense cache's on the same tokens. Writes a JSON file and prints a table.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mustafar_jax as mj
from benchmarks.origin import where
from mustafar_jax.generation import DENSE

CONFIGS = {
    "dense": DENSE,
    "every entry kept": mj.CompressionConfig(0.001, 0.001),
    "every entry kept, centred": mj.CompressionConfig(0.001, 0.001, center_keys=True),
    "published rule, 0.5": mj.CompressionConfig(0.5, 0.5),
    "recommended, 0.5": mj.CompressionConfig.recommended(0.5, 0.5),
    "published rule, 0.7": mj.CompressionConfig(0.7, 0.7),
    "recommended, 0.7": mj.CompressionConfig.recommended(0.7, 0.7),
}


def main() -> None:
    """Measure every config on every window, in batches."""
    options = _parser().parse_args()
    origin = where()  # the commit that is measured, not one made meanwhile
    model, tokenizer = mj.models.load(options.model, dtype=options.dtype)
    length = options.prompt + options.continuation
    tokens = np.concatenate([windows(tokenizer, text, options.windows, length) for text in options.text])
    scores = {
        name: measure(model, tokens, config, options.prompt, options.batch)
        for name, config in track(CONFIGS.items(), "configs", console=Console(stderr=True))
    }
    rows = [row(model, name, config, scores, length) for name, config in CONFIGS.items()]
    settings = vars(options) | {
        "model": pathlib.Path(options.model).name,
        "text": [pathlib.Path(text).name for text in options.text],
        "output": options.output.name,
    }
    result = {"settings": settings, "where": origin, "windows": len(tokens), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, default=str) + "\n")
    Console().print(table(rows))


def windows(tokenizer: Any, text: str, count: int, length: int) -> np.ndarray:
    """int32 [count, length]: windows that begin at even distances in a text file."""
    ids = np.asarray(tokenizer(pathlib.Path(text).read_text(encoding="utf-8"))["input_ids"], np.int32)
    if len(ids) < count * length:
        raise ValueError(f"{text} has {len(ids)} tokens; {count} windows of {length} need {count * length}")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return ids[starts[:, None] + np.arange(length)]


def measure(
    model: Any, tokens: np.ndarray, config: mj.CompressionConfig, prompt_length: int, batch: int
) -> dict[str, Any]:
    """Mean negative log-likelihood of each window, and the seconds that all took."""
    start = time.perf_counter()
    losses = [
        -np.asarray(mj.log_likelihoods(model, part, prompt_length=prompt_length, config=config, padding=False)).mean(
            axis=1
        )
        for part in np.array_split(tokens, -(-len(tokens) // batch))
    ]
    return {"losses": np.concatenate(losses), "seconds": time.perf_counter() - start}


def row(model: Any, name: str, config: mj.CompressionConfig, scores: dict[str, Any], length: int) -> dict[str, Any]:
    """A config's losses, its difference from dense with the standard error over windows, and its caches' bytes."""
    losses, difference = scores[name]["losses"], scores[name]["losses"] - scores["dense"]["losses"]
    caches = model.init_cache(config, batch=1, capacity=length)
    return {
        "name": name,
        "config": dataclasses.asdict(config),
        "true_sparsity": config.true_sparsity(model.config.head_dim),
        "nbytes": sum(cache.nbytes for cache in caches),
        "dense_nbytes": sum(cache.dense_nbytes for cache in caches),
        "loss": float(losses.mean()),
        "increase": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else None,
        "largest_difference": float(np.abs(difference).max()),
        "losses": losses.tolist(),
        "seconds": scores[name]["seconds"],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as text."""
    out = Table(title="mean negative log-likelihood, nats per token")
    for column in ("cache", "true sparsity", "bytes of dense", "loss", "increase over dense"):
        out.add_column(column, justify="left" if column == "cache" else "right")
    for entry in rows:
        error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.4f}"
        sparsity = " / ".join(f"{x:.4g}" for x in entry["true_sparsity"])
        held = f"{entry['nbytes'] / entry['dense_nbytes']:.1%}"
        out.add_row(entry["name"], sparsity, held, f"{entry['loss']:.4f}", f"{entry['increase']:+.4f}{error}")
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--text", required=True, nargs="+", help="text files")
    parser.add_argument("--windows", type=int, default=8, help="of each text (%(default)s)")
    parser.add_argument("--prompt", type=int, default=1536, help="tokens prefilled (%(default)s)")
    parser.add_argument("--continuation", type=int, default=512, help="tokens scored (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows at once (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="of weights and cache (%(default)s)")
    output = pathlib.Path("benchmarks/results/local/likelihood.json")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="the result file (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
