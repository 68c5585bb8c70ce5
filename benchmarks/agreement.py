"""How closely two implementations of attention agree over a long continuation: python -m benchmarks.agreement.

Teacher-forced: a prompt is prefilled, and the same tokens are then decoded one by one with either implementation; of
each step, the RMS error ratio of the logits of one to those of the other. Free: either continues the prompt greedily;
for each row, the first step at which their tokens differ, and the gap between the reference's two best logits there,
which tells a tie from a fault. Writes a JSON file and prints a summary.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import mustafar_jax as mj
from benchmarks.generation import SHAPES, random_model
from benchmarks.origin import where
from mustafar_jax.generation import Caches, decode_step, prefill_prompt


def main() -> None:
    """Compare, print and write."""
    options = _parser().parse_args()
    if options.model and not options.text:
        raise SystemExit("--model needs --text")
    model, tokens = _model_and_tokens(options)
    config = mj.CompressionConfig.recommended(options.sparsity, options.sparsity)
    names = {"implementation": options.implementation, "reference": options.reference}
    ratios = forced(model, tokens, options.prompt, config, **names)
    different = free(model, tokens[:, : options.prompt], options.steps, config, **names)
    names = {name: pathlib.Path(path).name for name in ("model", "text", "output") if (path := getattr(options, name))}
    result = {"settings": vars(options) | names, "where": where(), "ratios": ratios.tolist(), "free": different}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(ratios)} steps: error ratio of the logits, median {np.median(ratios):.2e}, largest {ratios.max():.2e}")
    for row, found in enumerate(different):
        text = "no difference" if found is None else f"differs at step {found['step']}, gap {found['gap']:.4f}"
        print(f"greedy, row {row}: {text}")


def _model_and_tokens(options: argparse.Namespace) -> tuple[Any, np.ndarray]:
    """The model, and one row of prompt and continuation: of the text, or random where the weights are."""
    length = options.prompt + options.steps
    if options.model is None:
        model = louder(random_model(SHAPES[options.shape]))
        return model, np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    model, tokenizer = mj.models.load(options.model, dtype="bfloat16")
    tokens = np.asarray(tokenizer(pathlib.Path(options.text).read_text(encoding="utf-8"))["input_ids"])[None]
    if tokens.shape[1] < length:
        raise ValueError(f"--text {options.text} has {tokens.shape[1]} tokens; wanted prompt and steps, {length}")
    return model, tokens[:, :length]


def forced(
    model: Any,
    tokens: np.ndarray,
    prompt_length: int,
    config: mj.CompressionConfig,
    *,
    implementation: str,
    reference: str,
) -> np.ndarray:
    """RMS error ratio of each step's logits, [steps], when both decode the tokens that follow the prompt."""
    actual, expected = (
        forced_logits(model, tokens, prompt_length, config, name) for name in (implementation, reference)
    )
    error, size = (jnp.sqrt(jnp.sum(x**2, axis=(1, 2))) for x in (actual - expected, expected))
    return np.asarray(error / size)


def forced_logits(
    model: Any, tokens: np.ndarray, prompt_length: int, config: mj.CompressionConfig, implementation: str
) -> jax.Array:
    """float32 [steps, B, V]: the logits after each token that follows the prompt in [B, S]."""
    batch, length = tokens.shape
    caches = model.init_cache(config, batch=batch, capacity=length)
    prompt, lengths = jnp.asarray(tokens[:, :prompt_length], jnp.int32), jnp.full(batch, prompt_length, jnp.int32)
    _, caches = prefill_prompt(model, prompt, lengths, caches, implementation=implementation)
    return _decode_given(model, jnp.asarray(tokens[:, prompt_length:].T, jnp.int32), caches, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _decode_given(model: Any, tokens: jax.Array, caches: Caches, implementation: str) -> jax.Array:
    def step(caches: Caches, token: jax.Array) -> tuple[Caches, jax.Array]:
        logits, caches = decode_step(model, token, caches, implementation=implementation)
        return caches, logits

    return lax.scan(step, caches, tokens)[1]


def free(
    model: Any, prompts: np.ndarray, steps: int, config: mj.CompressionConfig, *, implementation: str, reference: str
) -> list[dict[str, Any] | None]:
    """For each prompt, the first step at which greedy tokens differ, with the gap there; None where none does."""
    actual, expected = (
        np.asarray(mj.generate(model, prompts, max_new_tokens=steps, config=config, implementation=name).tokens)
        for name in (implementation, reference)
    )
    if (actual == expected).all():
        return [None] * len(prompts)
    whole = np.concatenate([prompts, expected], axis=1)
    best = np.asarray(lax.top_k(forced_logits(model, whole, prompts.shape[1], config, reference), 2)[0])
    found: list[dict[str, Any] | None] = []
    for row, differs in enumerate(actual != expected):
        step = int(np.argmax(differs))
        # the logits after the token before; the first token comes from the prefill, which both share
        likeliest, next_likeliest = best[max(step - 1, 0), row]
        found.append({"step": step, "gap": float(likeliest - next_likeliest)} if differs.any() else None)
    return found


def louder(model: Any) -> Any:
    """A random model whose matrices are large enough for attention to matter to the logits: 1.3 / sqrt(inputs)."""
    graph, state = nnx.split(model)
    factor = 1.3 / (0.02 * model.config.hidden_size**0.5)
    return nnx.merge(graph, jax.tree.map(lambda weight: weight * factor if weight.ndim > 1 else weight, state))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder, .gguf file or hub id, with --text; else random weights")
    parser.add_argument("--text", help="a text file that the prompt and its continuation begin")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of random weights (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.7, help="of keys and values (%(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens prefilled (%(default)s)")
    parser.add_argument("--steps", type=int, default=1024, help="tokens decoded (%(default)s)")
    parser.add_argument("--implementation", default="triton", help="what is compared (%(default)s)")
    parser.add_argument("--reference", default="xla", help="with what (%(default)s)")
    output = pathlib.Path("benchmarks/results/local/agreement.json")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="the result file (%(default)s)")
    return parser


if __name__ == "__main__":
    main()
