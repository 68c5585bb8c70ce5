"""How closely two implementations of attention agree over a long continuation: python -m benchmarks.agreement.

Teacher-forced: a prompt is prefilled, and the same tokens are then decoded one by one with either implementation; of
each step, the RMS error ratio of the logits of one to those of the other. Free: either continues the prompt greedily;
for each row, the first step at which their tokens differ, and the gap between the reference's two best logits there,
which tells a tie from a fault. Layer by layer: what attention is off by at the last token, on queries and caches of the
reference. Writes a JSON file and prints a summary; the exit status is 1 where a bar is missed.

Attention may be off by 5e-3, RMS over all layers. Any two kernels round differently, and a model in bfloat16 makes more
of that from layer to layer, until its logits hardly tell a good kernel from a bad one. How much is measured: the same
tokens pass the same caches through the reference, whose attention is off at random in every layer and step by 5e-3. The
logits, RMS over all steps, may be off by 1.25 times what that makes of them. Two logits that are off by so much each
change places if they are nearer than about 1.4 times that: greedy tokens may differ where the gap between the two best
is at most four times as large, 6 times the error.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import mustafar_jax as mj
from benchmarks.generation_cases import SHAPES
from benchmarks.generation_measure import random_model
from benchmarks.origin import where
from benchmarks.table import folder_of
from mustafar_jax.generation import Caches, decode_step, prefill_prompt

BAR = 5e-3
"""The RMS error ratio that attention may have, in bfloat16."""
MARGIN = 1.25
"""How much more the logits may differ than with attention that is off by `BAR`: runs of other noise vary by a tenth."""
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
    ratios, expected = forced(model, tokens, options.prompt, config, **names)
    different = free(model, tokens[:, : options.prompt], options.steps, config, **names)
    layers = attention_ratios(model, tokens, config, **names)
    verdict = judge(ratios, different, layers, expected)
    origin = where()
    path = options.output or folder_of(origin["device"]) / "agreement.json"
    settings = vars(options) | {"output": None}
    settings |= {name: pathlib.Path(given).name for name in ("model", "text") if (given := settings[name])}
    result = {"settings": settings, "where": origin} | verdict
    result |= {"layers": layers.tolist(), "ratios": ratios.tolist(), "free": different}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    report(verdict, ratios, layers, different)
    if not verdict["passed"]:
        raise SystemExit("the two do not agree")


def judge(
    ratios: np.ndarray, different: Sequence[dict[str, Any] | None], layers: np.ndarray, expected: float
) -> dict[str, Any]:
    """Whether the bars hold.

    Args:
        ratios: [steps], from `forced`.
        different: from `free`.
        layers: [layers], from `attention_ratios`.
        expected: RMS, from `forced`.

    Returns:
        "attention_rms" of the layers; "rms" of the ratios and its "bar"; "expected_rms"; "gap_bar", the gap that
        differing tokens may have, relative to the logits' RMS; "attention", "forced", "greedy" and "passed", whether
        each bar and all hold.
    """
    attention, rms, bar = rms_of(layers), rms_of(ratios), MARGIN * expected
    ties = all(found is None or found["gap"] <= GAP * bar * found["rms"] for found in different)
    parts = {"attention": attention <= BAR, "forced": rms <= bar, "greedy": ties}
    bars = {"attention_rms": attention, "rms": rms, "bar": bar, "expected_rms": expected, "gap_bar": GAP * bar}
    return bars | parts | {"passed": all(parts.values())}


def report(
    verdict: dict[str, Any], ratios: np.ndarray, layers: np.ndarray, different: Sequence[dict[str, Any] | None]
) -> None:
    """Print what was found, beside the bars."""
    print(f"attention: RMS of {len(layers)} layers {verdict['attention_rms']:.2e} (bar {BAR})", end="")
    print(f", largest {layers.max():.2e}")
    print(f"{len(ratios)} steps: error ratio of the logits, RMS {verdict['rms']:.2e}", end="")
    print(f" (bar {verdict['bar']:.2e}), median {np.median(ratios):.2e}, largest {ratios.max():.2e}")
    print(f"the reference with attention off by {BAR}: RMS {verdict['expected_rms']:.2e}")
    for row, found in enumerate(different):
        text = "no difference"
        if found is not None:
            bar = verdict["gap_bar"] * found["rms"]
            text = f"differs at step {found['step']}, gap {found['gap']:.4f} (bar {bar:.4f})"
        print(f"greedy, row {row}: {text}")


def rms_of(ratios: np.ndarray) -> float:
    """Over all of them."""
    return float(np.sqrt(np.mean(ratios**2)))


def off_by(model: Any, error: float) -> Any:
    """The same model, whose attention is off at random by an error relative to its RMS."""
    other = nnx.merge(*nnx.split(model))
    for layer in other.layers:
        layer.self_attn.o_proj = _Off(layer.self_attn.o_proj, error)
    return other


class _Off(nnx.Module):
    """An output projection of attention that is off: attended [B, N, H]."""

    def __init__(self, project: nnx.Module, error: float) -> None:
        self.project, self.error = project, error

    def __call__(self, attended: jax.Array) -> jax.Array:
        exact = attended.astype(jnp.float32)
        seed = lax.bitcast_convert_type(exact.sum(), jnp.uint32)  # another in each layer and step
        size = self.error * jnp.sqrt(jnp.mean(exact**2, axis=-1, keepdims=True))
        noise = size * jax.random.normal(jax.random.key(seed), attended.shape)
        return self.project((exact + noise).astype(attended.dtype))


def attention_ratios(
    model: Any, tokens: np.ndarray, config: mj.CompressionConfig, *, implementation: str | None, reference: str
) -> np.ndarray:
    """RMS error ratio of each layer's attention, [layers], at the last of the tokens, where all others are the prompt.

    Queries and caches are the reference's.
    """
    caches = _prefilled(model, tokens, tokens.shape[1] - 1, config, reference)
    compared, found = nnx.merge(*nnx.split(model)), list[float]()
    for layer in compared.layers:
        layer.self_attn = _Compared(layer.self_attn, implementation, found.append)
    decode_step(compared, jnp.asarray(tokens[:, -1], jnp.int32), caches, implementation=reference)
    return np.array(found)


class _Compared(nnx.Module):
    """A layer's attention that notes how another implementation's differs."""

    def __init__(self, attention: Any, implementation: str | None, note: Callable[[float], None]) -> None:
        self.attention, self.project = attention, attention.o_proj
        attention.o_proj = _unprojected
        self.implementation, self.note = implementation, note

    def decode(self, hidden: jax.Array, cache: Any, reference: str) -> tuple[jax.Array, Any]:
        other, _ = self.attention.decode(hidden, cache, self.implementation)
        attended, cache = self.attention.decode(hidden, cache, reference)
        actual, expected = other.astype(jnp.float32), attended.astype(jnp.float32)
        self.note(float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)))
        return self.project(attended), cache


def _unprojected(attended: jax.Array) -> jax.Array:
    """In an output projection's place."""
    return attended


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
) -> tuple[np.ndarray, float]:
    """Decode the tokens that follow the prompt with both.

    Returns:
        The RMS error ratio of each step's logits, [steps], and what the RMS of these would be if it were the reference
        whose attention is off by `BAR`.
    """
    exact = forced_logits(model, tokens, prompt_length, config, reference)
    actual = forced_logits(model, tokens, prompt_length, config, implementation)
    off = forced_logits(model, tokens, prompt_length, config, reference, decoder=off_by(model, BAR))
    return error_ratios(actual, exact), rms_of(error_ratios(off, exact))


def error_ratios(actual: jax.Array, expected: jax.Array) -> np.ndarray:
    """Of logits [steps, B, V]: [steps]."""
    error, size = (jnp.sqrt(jnp.sum(x**2, axis=(1, 2))) for x in (actual - expected, expected))
    return np.asarray(error / size)


def forced_logits(
    model: Any,
    tokens: np.ndarray,
    prompt_length: int,
    config: mj.CompressionConfig,
    implementation: str | None,
    decoder: Any = None,
) -> jax.Array:
    """float32 [steps, B, V]: the logits after each token that follows the prompt in [B, S].

    `decoder` takes the model's place after the prompt.
    """
    caches = _prefilled(model, tokens, prompt_length, config, implementation)
    return _decode_given(
        model if decoder is None else decoder,
        jnp.asarray(tokens[:, prompt_length:].T, jnp.int32),
        caches,
        implementation,
    )


def _prefilled(
    model: Any, tokens: np.ndarray, prompt_length: int, config: mj.CompressionConfig, implementation: str | None
) -> Caches:
    """Caches that hold the prompt, with room for the other tokens."""
    batch, length = tokens.shape
    caches = model.init_cache(config, batch=batch, capacity=length)
    prompt, lengths = jnp.asarray(tokens[:, :prompt_length], jnp.int32), jnp.full(batch, prompt_length, jnp.int32)
    _, caches = prefill_prompt(model, prompt, lengths, caches, implementation=implementation)
    return caches


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
    length: dict[str, Any] = {"max_new_tokens": steps, "eos_id": ()}
    actual, expected = (
        np.asarray(mj.generate(model, prompts, config=config, implementation=name, **length).tokens)
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
