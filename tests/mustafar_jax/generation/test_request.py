"""What is refused before any work, and what reaches the model."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import Layer
from tests.mustafar_jax.generation.setting import CONFIGS, Context, Overflowing, counting


@pytest.mark.parametrize("run", [mj.generate, mj.stream, mj.log_likelihoods])
@pytest.mark.parametrize(("config", "implementation"), [(None, "triton"), (CONFIGS["published"], "cudnn")])
def test_who_cannot_attend_is_refused_before_any_work(llama, run, config, implementation):
    length = {"prompt_length": 1} if run is mj.log_likelihoods else {"max_new_tokens": 3}
    progress = functools.partial(pytest.fail, "work was done")
    with pytest.raises(NotImplementedError, match=f"implementation='{implementation}' .*attend"):
        run(llama, [[3, 10, 4]], **length, config=config, implementation=implementation, progress=progress)


@jax.tree_util.register_static
class Asked:
    """A layer that notes whom it is told to attend and pack by: a list for each of its methods."""

    def __init__(self) -> None:
        self.prefills: list[Any] = []
        self.decodes: list[Any] = []

    def prefill(self, hidden, cache, lengths, *, implementation=None):
        self.prefills.append(implementation)
        return hidden, cache

    def decode(self, hidden, cache, *, implementation=None):
        self.decodes.append(implementation)
        return hidden, cache


@pytest.mark.parametrize("run", [mj.generate, mj.stream, mj.log_likelihoods])
def test_the_implementation_reaches_every_layer(run):
    layers = Asked(), Asked()
    model = Overflowing(counting().table, Context(100, 100), layers)
    length = {"prompt_length": 1} if run is mj.log_likelihoods else {"max_new_tokens": 3}
    result = run(model, [[3, 10, 4]], **length, implementation=["triton", "xla"])
    if run is mj.stream:
        assert len(list(result)) == 3
    asked = layers[0].decodes.pop(0)  # before any work, whether it can
    for layer in layers:
        assert layer.prefills == layer.decodes == [asked] == [("triton", "xla")]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Untouched:
    """A model that must not be run: `embed` is where all work begins."""

    head_dim: int = 32

    @property
    def config(self) -> Context:
        return Context(vocab_size=10, max_position_embeddings=64)

    @property
    def layers(self) -> Sequence[Layer]:
        return ()

    def embed(self, tokens):
        raise AssertionError("the model was run")

    def logits(self, hidden):
        raise AssertionError("the model was run")

    def init_cache(self, config, *, batch, capacity):
        sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": 1, "head_dim": self.head_dim}
        return (LayerCache.init(config, **sizes, dtype=jnp.float32, inv_freq=np.ones(self.head_dim // 2)),)


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "rank 1": ([1, 2], r"tokens is int64\[2\]; wanted integers \[B, S\]"),
    "rank 3": (np.ones((1, 1, 1), np.int32), r"tokens is int32\[1, 1, 1\]; wanted integers \[B, S\]"),
    "floats": ([[1.0, 2.0]], r"tokens is float64\[1, 2\]; wanted integers \[B, S\]"),
    "several lengths": ([[1, 2], [3]], r"tokens has rows of several lengths; wanted integers \[B, S\]: pad them"),
    "a tokenizer's answer": ({"input_ids": [[1]]}, r"tokens is a dict; wanted integers \[B, S\], such as its"),
    "no token": (np.ones((2, 0), int), r"tokens has shape \(2, 0\): an empty prompt; wanted at least one token"),
    "no sequence": (np.ones((0, 2), int), r"tokens has shape \(0, 2\): an empty prompt; wanted at least one token"),
    "above the vocabulary": ([[1, 10]], r"tokens holds 1 \.\. 10; the vocabulary is 0 \.\. 9"),
    "negative": ([[-1, 9]], r"tokens holds -1 \.\. 9; the vocabulary is 0 \.\. 9"),
}


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no new token": ({"max_new_tokens": 0}, r"max_new_tokens=0 must be an integer of at least 1"),
    "past the context": ({"max_new_tokens": 62}, r"3 tokens of prompt and max_new_tokens=62 exceed .* context of 64"),
    "empty prompt": ({"lengths": [3, 0]}, r"lengths=\[3, 0\] must lie in 1 \.\. 3"),
    "length above the prompt": ({"lengths": [4, 3]}, r"lengths=\[4, 3\] must lie in 1 \.\. 3"),
    "one length": ({"lengths": [3]}, r"lengths is int\d\d\[1\]; wanted integers \[2\]"),
    "broken length": ({"lengths": [2.5, 3.0]}, r"lengths is float\d\d\[2\]; wanted integers \[2\]"),
    "negative temperature": ({"temperature": -0.5}, r"temperature=-0.5 must be finite and at least 0"),
    "nan temperature": ({"temperature": float("nan")}, r"temperature=nan must be finite and at least 0"),
    "infinite temperature": ({"temperature": float("inf")}, r"temperature=inf must be finite"),
    "top_p of 0": ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    "top_p above 1": ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    "top_p of nan": ({"top_p": float("nan")}, r"top_p=nan must lie in \(0, 1\]"),
    "no key": ({"temperature": 1.0}, r"key=None: temperature=1.0 .* needs a jax.random.key"),
    "two keys": (
        {"temperature": 1.0, "key": jax.random.split(jax.random.key(0))},
        r"key is key<.*>\[2\]; wanted one jax.random.key",
    ),
    "stop tokens in rows": ({"eos_id": [[2]]}, r"eos_id=\[\[2\]\] must be an integer, a sequence of integers, or None"),
    "ragged stop tokens": ({"eos_id": [[2], [3, 4]]}, r"eos_id has rows of several lengths; wanted an integer"),
    "negative stop token": ({"eos_id": -1}, r"eos_id=-1 must hold tokens"),
    "ragged lengths": ({"lengths": [[3], [1, 2]]}, r"lengths has rows of several lengths; wanted integers \[2\]"),
    "top_p without a temperature": ({"top_p": 0.9}, r"top_p=0.9 needs a temperature above 0: temperature=0.0 takes"),
    "negative minimum": ({"min_new_tokens": -1}, r"min_new_tokens=-1 must be an integer in 0 \.\. max_new_tokens=2"),
    "minimum above the most": ({"min_new_tokens": 3}, r"min_new_tokens=3 must be an integer in 0 \.\. .*=2"),
    "unknown implementation": ({"implementation": "cuda"}, r"implementation='cuda' must be one of .*'xla'"),
    "no implementation": ({"implementation": ()}, r"implementation=\(\) .*wanted at least one"),
}


# What is of another type altogether
TEXT = r"tokens=.* is text; wanted integers \[B, S\]: encode it first, as by mustafar_jax.generation.text.encode"
OTHER_TOKENS: dict[str, tuple[Any, str]] = {
    "text": ("hello", TEXT),
    "texts": (["hello", "you"], TEXT),
    "None": (None, r"tokens=None is of type NoneType; wanted integers \[B, S\]"),
    "a function": (len, r"tokens=.* is of type builtin_function_or_method; wanted integers"),
    "keys": (jax.random.split(jax.random.key(0)), r"tokens is of type .*Array.*; wanted integers \[B, S\]"),
}
OTHER_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "config: a dict": ({"config": {"k_sparsity": 0.5}}, r"config=\{.*\} must be a CompressionConfig, or None"),
    "config: a name": ({"config": "dense"}, r"config='dense' must be a CompressionConfig, or None"),
    "progress": ({"progress": 5}, r"progress=5 must be a function of \(done, total\), or None"),
}
OTHER_SAMPLING: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{name}: {value!r}": ({name: value}, rf"{name}={re.escape(repr(value))} must be an integer")
       for name in ("max_new_tokens", "min_new_tokens") for value in ("2", True, None, 1.5, [2])},
    **{f"{name}: {value!r}": ({name: value}, rf"{name}={re.escape(repr(value))} .*a number")
       for name in ("temperature", "top_p") for value in ("0.5", True, None, [0.5], 1j)},
    "eos_id: text": ({"eos_id": "</s>"}, r"eos_id='</s>' is text; wanted an integer, a sequence of integers, or None"),
    "eos_id: a set": ({"eos_id": {1, 2}}, r"eos_id=\{1, 2\} is of type set; wanted an integer, a sequence"),
    "eos_id: True": ({"eos_id": True}, r"eos_id=True must be an integer, a sequence of integers, or None"),
    "eos_id: broken": ({"eos_id": 2.5}, r"eos_id=2.5 must be an integer, a sequence of integers, or None"),
    "eos_ids: broken": ({"eos_id": [2, 2.5]}, r"eos_id=\[2, 2.5\] must be an integer, a sequence of integers"),
    "lengths: text": ({"lengths": "23"}, r"lengths='23' is text; wanted integers \[2\]"),
    "lengths: a function": ({"lengths": len}, r"lengths=.* is of type .*; wanted integers \[2\]"),
    "key: a seed": ({"temperature": 1.0, "key": 7}, r"key=7 is of type int; wanted one jax.random.key"),
    "key: of the old kind": ({"key": jax.random.PRNGKey(0)}, r"key is uint32\[2\]; wanted one jax.random.key"),
}  # fmt: skip
RUNS: dict[Any, dict[str, Any]] = {
    mj.generate: {"max_new_tokens": 2}, mj.stream: {"max_new_tokens": 2}, mj.log_likelihoods: {"prompt_length": 1}
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("model", ["some/model", pathlib.Path("model.gguf")])
def test_a_path_in_a_model_s_place_is_told_how_to_load_it(run, model):
    message = f"model='{model}' is a path or a name; wanted a model: load it with mustafar_jax.models.load"
    with pytest.raises(TypeError, match=message):
        run(model, [[1, 2]], **RUNS[run])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (None, "model is of type NoneType and lacks embed, "),
        ((Untouched(), "its tokenizer"), "model is of type tuple and lacks .*models.load, which gives a model and its"),
        (type(Untouched()), "model is of type type and lacks config.vocab_size, config.max_position_embeddings;"),
    ],
)
def test_what_is_no_model_is_refused(run, model, missing):
    with pytest.raises(TypeError, match=missing):
        run(model, [[1, 2]], **RUNS[run])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_what_are_no_tokens_are_refused_before_any_work(run, case):
    tokens, message = OTHER_TOKENS[case]
    with pytest.raises(TypeError, match=message):
        run(Untouched(), tokens, **RUNS[run])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", OTHER_OPTIONS)
def test_options_of_another_type_are_refused_before_any_work(run, case):
    options, message = OTHER_OPTIONS[case]
    with pytest.raises(TypeError, match=message):
        run(Untouched(), np.ones((2, 3), np.int32), **RUNS[run] | options)


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
@pytest.mark.parametrize("case", OTHER_SAMPLING)
def test_numbers_keys_and_stops_of_another_type_are_refused_before_any_work(run, case):
    options, message = OTHER_SAMPLING[case]
    with pytest.raises(TypeError, match=message):
        run(Untouched(), np.ones((2, 3), np.int32), **{"max_new_tokens": 2} | options)


@pytest.mark.parametrize("prompt_length", ["1", True, None, 1.0, [1]])
def test_prompt_lengths_of_another_type_are_refused_before_any_work(prompt_length):
    with pytest.raises(TypeError, match=re.escape(f"prompt_length={prompt_length!r} must be an integer")):
        mj.log_likelihoods(Untouched(), np.ones((2, 3), np.int32), prompt_length=prompt_length)


@pytest.mark.parametrize("run", RUNS)
def test_traced_tokens_are_refused(run):
    with pytest.raises(TypeError, match=r"tokens is traced; wanted integers \[B, S\]: call this outside of jit"):
        jax.jit(lambda tokens: run(Untouched(), tokens, **RUNS[run]))(np.ones((2, 3), np.int32))


@pytest.mark.parametrize("number", [np.float32, np.float64, jnp.float32, jnp.bfloat16, np.array, int])
def test_numbers_of_any_kind_are_numbers(number):
    options: dict[str, Any] = {"temperature": number(1), "top_p": number(1), "key": jax.random.key(0)}
    counts: dict[str, Any] = {"max_new_tokens": np.int64(3), "min_new_tokens": np.int32(1), "eos_id": np.int8(3)}
    assert mj.generate(counting(), [[1]], **options, **counts).tokens.shape == (1, 3)


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens_are_refused_before_any_work(run, case):
    tokens, message = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=message):
        run(Untouched(), tokens, max_new_tokens=2)


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_before_any_work(run, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        run(Untouched(), np.ones((2, 3), np.int32), **{"max_new_tokens": 2} | options)


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
def test_a_head_dim_that_cannot_be_packed_is_refused_before_any_work(run):
    model, tokens = Untouched(head_dim=48), np.ones((2, 3), np.int32)
    with pytest.raises(ValueError, match="head_dim=48 must be a multiple of 32 where keys or values are pruned"):
        run(model, tokens, max_new_tokens=2, config=CompressionConfig())


def test_the_context_is_used_to_its_last_token():
    with pytest.raises(AssertionError, match="the model was run"):
        mj.generate(Untouched(), np.ones((2, 3), np.int32), max_new_tokens=61)
    with pytest.raises(AssertionError, match="the model was run"):
        mj.log_likelihoods(Untouched(), np.ones((2, 64), np.int32), prompt_length=63)


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_texts_are_refused_before_any_work(case):
    tokens, message = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=message):
        mj.log_likelihoods(Untouched(), tokens, prompt_length=1)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (5, {"prompt_length": 0}, r"prompt_length=0 must lie in 1 \.\. 4"),
        (5, {"prompt_length": 5}, r"prompt_length=5 must lie in 1 \.\. 4"),
        (1, {"prompt_length": 1}, r"tokens has shape \(2, 1\).* at least two tokens"),
        (65, {"prompt_length": 5}, r"tokens .* 65 .* context of 64"),
        (5, {"prompt_length": 1, "implementation": "cuda"}, r"implementation='cuda' must be one of .*'xla'"),
    ],
)
def test_bad_scoring_is_refused_before_any_work(length, options, message):
    with pytest.raises(ValueError, match=message):
        mj.log_likelihoods(Untouched(), np.ones((2, length), np.int32), **options)


def test_scoring_with_a_head_dim_that_cannot_be_packed_is_refused_before_any_work():
    with pytest.raises(ValueError, match="head_dim=48 must be a multiple of 32"):
        mj.log_likelihoods(Untouched(48), np.ones((1, 5), np.int32), prompt_length=2, config=CompressionConfig())
