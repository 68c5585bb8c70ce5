"""How closely two implementations of attention agree over a long continuation: python -m benchmarks.agreement.

Teacher-forced: a prompt is prefilled, and the same tokens are then decoded one by one with either implementation; of
each step, the RMS error ratio of the logits of one to those of the other. Free: either continues the prompt greedily;
for each row, the first step at which their tokens differ, and the gap between the reference's two best logits there,
which tells a tie from a fault. Writes a JSON file and prints a summary; the exit status is 1 where a bar is missed.

Any two kernels round differently, and a model in bfloat16 makes more of that from layer to layer. What to expect is
measured: on NVIDIA GPUs, the same tokens pass dense caches, through cuDNN and through XLA. The logits, RMS over all
steps, may be off by 1.25 times what these two differ by, but by no more than twice the bar that holds elsewhere: 5e-3,
what attention itself may be off by, times the root of the layers, which each add such an error to the others'. Two
logits that are off by so much each change places if they are nearer than about 1.4 times that: greedy tokens may differ
where the gap between the two best is at most four times as large, 6 times the error.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import mustafar_jax as mj
from benchmarks.generation import SHAPES, random_model
from benchmarks.origin import where
from benchmarks.table import folder_of
from mustafar_jax.generation import Caches, decode_step, prefill_prompt
from mustafar_jax.implementations import on_cuda

BAR = 5e-3
"""The RMS error ratio that attention may have, in bfloat16."""
MARGIN = 1.25
"""How much more than dense attention by two implementations what is compared may differ."""
GAP = 6.0
"""Errors of a logit that two logits may lie apart that change places."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and write; SystemExit where the two do not agree."""
    options = _parser().parse_args(arguments)
    if options.model and not options.text:
        raise SystemExit("--model needs --text")
    model, tokens = _model_and_tokens(options)
    config = mj.CompressionConfig.recommended(options.sparsity, options.sparsity)
    names = {"implementation": options.implementation, "reference": options.reference}
    ratios = forced(model, tokens, options.prompt, config, **names)
    different = free(model, tokens[:, : options.prompt], options.steps, config, **names)
    expected = dense_rms(model, tokens, options.prompt)
    verdict = judge(ratios, different, model.config.num_layers, expected)
    origin = where()
    path = options.output or folder_of(origin["device"]) / "agreement.json"
    settings = vars(options) | {"output": None}
    settings |= {name: pathlib.Path(given).name for name in ("model", "text") if (given := settings[name])}
    result = {"settings": settings, "where": origin} | verdict | {"ratios": ratios.tolist(), "free": different}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(ratios)} steps: error ratio of the logits, RMS {verdict['rms']:.2e} (bar {verdict['bar']:.2e})", end=""
    )
    print(f", median {np.median(ratios):.2e}, largest {ratios.max():.2e}")
    if expected is not None:
        print(f"dense caches, cuDNN beside XLA: RMS {expected:.2e}")
    for row, found in enumerate(different):
        text = "no difference"
        if found is not None:
            text = (
                f"differs at step {found['step']}, gap {found['gap']:.4f} (bar {verdict['gap_bar'] * found['rms']:.4f})"
            )
        print(f"greedy, row {row}: {text}")
    if not verdict["passed"]:
        raise SystemExit("the two do not agree")


def judge(
    ratios: np.ndarray,
    different: Sequence[dict[str, Any] | None],
    layers: int,
    expected: float | None = None,
) -> dict[str, Any]:
    """Whether the bars hold.

    Args:
        ratios: [steps], from `forced`.
        different: from `free`.
        layers: of the model.
        expected: from `dense_rms`, where it was measured.

    Returns:
        "rms" of the ratios and its "bar"; "dense_rms", what is expected; "gap_bar", the gap that differing tokens may
        have, relative to the logits' RMS; "forced", "greedy" and "passed", whether either bar and both hold.
    """
    rms, bar = rms_of(ratios), BAR * layers**0.5
    if expected is not None:
        bar = min(MARGIN * expected, 2 * bar)
    ties = all(found is None or found["gap"] <= GAP * bar * found["rms"] for found in different)
    parts = {"forced": rms <= bar, "greedy": ties}
    bars = {"rms": rms, "bar": bar, "dense_rms": expected, "gap_bar": GAP * bar}
    return bars | parts | {"passed": all(parts.values())}


def rms_of(ratios: np.ndarray) -> float:
    """Over all steps."""
    return float(np.sqrt(np.mean(ratios**2)))


def dense_rms(model: Any, tokens: np.ndarray, prompt_length: int) -> float | None:
    """What the logits differ by when the same tokens are decoded with dense caches, through cuDNN and through XLA.

    None where cuDNN cannot run.
    """
    if not on_cuda():
        return None
    names = {"implementation": "cudnn", "reference": "xla"}
    try:
        return rms_of(forced(model, tokens, prompt_length, mj.CompressionConfig(0, 0), **names))
    except NotImplementedError:
        return None


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
    implementation: str | None,
    reference: str,
) -> np.ndarray:
    """RMS error ratio of each step's logits, [steps], when both decode the tokens that follow the prompt."""
    actual, expected = (
        forced_logits(model, tokens, prompt_length, config, name) for name in (implementation, reference)
    )
    error, size = (jnp.sqrt(jnp.sum(x**2, axis=(1, 2))) for x in (actual - expected, expected))
    return np.asarray(error / size)


def forced_logits(
    model: Any, tokens: np.ndarray, prompt_length: int, config: mj.CompressionConfig, implementation: str | None
) -> jax.Array:
    """float32 [steps, B, V]: the logits after each token that follows the prompt in [B, S]."""
    batch, length = tokens.shape
    caches = model.init_cache(config, batch=batch, capacity=length)
    prompt, lengths = jnp.asarray(tokens[:, :prompt_length], jnp.int32), jnp.full(batch, prompt_length, jnp.int32)
    _, caches = prefill_prompt(model, prompt, lengths, caches, implementation=implementation)
    return _decode_given(model, jnp.asarray(tokens[:, prompt_length:].T, jnp.int32), caches, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _decode_given(model: Any, tokens: jax.Array, caches: Caches, implementation: str | None) -> jax.Array:
    def step(caches: Caches, token: jax.Array) -> tuple[Caches, jax.Array]:
        logits, caches = decode_step(model, token, caches, implementation=implementation)
        return caches, logits

    return lax.scan(step, caches, tokens)[1]


def free(
    model: Any,
    prompts: np.ndarray,
    steps: int,
    config: mj.CompressionConfig,
    *,
    implementation: str | None,
    reference: str,
) -> list[dict[str, Any] | None]:
    """For each prompt, the first step at which greedy tokens differ; None where none does.

    "step"; "gap", between the reference's two best logits that the token was chosen by; "rms", of all those logits.
    """
    actual, expected = (
        np.asarray(mj.generate(model, prompts, max_new_tokens=steps, config=config, implementation=name).tokens)
        for name in (implementation, reference)
    )
    if (actual == expected).all():
        return [None] * len(prompts)
    whole = np.concatenate([prompts, expected], axis=1)
    logits = forced_logits(model, whole, prompts.shape[1], config, reference)
    best, sizes = np.asarray(lax.top_k(logits, 2)[0]), np.asarray(jnp.sqrt(jnp.mean(logits**2, axis=-1)))
    found: list[dict[str, Any] | None] = []
    for row, differs in enumerate(actual != expected):
        if not differs.any():
            found.append(None)
            continue
        step = int(np.argmax(differs))
        before = max(step - 1, 0), row  # the first token comes from the prefill, which both share
        likeliest, next_likeliest = best[before]
        found.append({"step": step, "gap": float(likeliest - next_likeliest), "rms": float(sizes[before])})
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
    parser.add_argument("--implementation", help="what is compared (the best that works)")
    parser.add_argument("--reference", default="xla", help="with what (%(default)s)")
    parser.add_argument(
        "--output", type=pathlib.Path, help="the result file (benchmarks/results/<device>/agreement.json)"
    )
    return parser


if __name__ == "__main__":
    main()
