import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mustafar_jax.config import CompressionConfig
from mustafar_jax.models import Llama, ModelConfig, llama
from mustafar_jax.models.config import rope_frequencies
from tests.models.reference import (
    DENSE,
    TINY,
    TOLERANCE,
    VOCABULARY,
    cached_logits,
    forward,
    random_model,
    random_tokens,
    saved_and_loaded,
    torch_logits,
)

# The contexts of the scaled variants are short enough for 100 tokens to pass them, and for head_dim 16 to have
# frequencies that are kept, scaled, and in between.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-2": {"num_key_value_heads": 4},
    "llama-3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5},
    "llama-3.1": {"rope_parameters": LLAMA3_SCALING},
    "llama-3.2": {"rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True, "head_dim": 32},
    "linear-scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "smollm2": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "biases-and-head-dim": {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": 1},
}


def tiny_llama(**overrides):
    return random_model(LlamaForCausalLM, LlamaConfig(**{**TINY, **overrides}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same weights in transformers and here."""
    reference = tiny_llama(rope_parameters=LLAMA3_SCALING)
    return reference, saved_and_loaded(reference, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    reference = tiny_llama(**VARIANTS[variant])
    model = saved_and_loaded(reference, tmp_path)
    tokens = random_tokens(2, 100)
    wanted = torch_logits(reference, tokens)
    assert wanted.std() > 0.5

    whole = forward(model, tokens)
    prompt, steps, caches = cached_logits(model, tokens[:, :36], np.array([36, 36]), tokens[:, 36:])

    np.testing.assert_allclose(whole, wanted, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(prompt, wanted[:, :36], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(steps, wanted[:, 36:], atol=TOLERANCE, rtol=0)
    assert [cache.lengths.tolist() for cache in caches] == [[100, 100]] * len(model.layers)


def test_a_ragged_batch_equals_its_prompts_one_by_one(pair):
    reference, model = pair
    lengths = np.array([5, 40, 17, 33])
    prompts, continuation = random_tokens(4, 40), random_tokens(4, 64)[::-1]
    prompt, steps, _ = cached_logits(model, prompts, lengths, continuation)
    for row, length in enumerate(lengths):
        alone = prompts[row : row + 1, :length]
        own_prompt, own_steps, _ = cached_logits(model, alone, lengths[row : row + 1], continuation[row : row + 1])
        np.testing.assert_allclose(prompt[row, :length], own_prompt[0], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(steps[row], own_steps[0], atol=TOLERANCE, rtol=0)
        wanted = torch_logits(reference, np.concatenate([alone, continuation[row : row + 1]], axis=1))[0]
        np.testing.assert_allclose(steps[row], wanted[length:], atol=TOLERANCE, rtol=0)


def test_padding_has_no_influence(pair):
    _, model = pair
    tokens, lengths = random_tokens(2, 12), jnp.array([7, 12])
    others = tokens.copy()
    others[0, 7:] = VOCABULARY - 1 - others[0, 7:]
    logits, expected = forward(model, others, lengths), forward(model, tokens, lengths)
    assert not np.array_equal(logits[0, 7:], expected[0, 7:])
    np.testing.assert_array_equal(logits[0, :7], expected[0, :7])
    np.testing.assert_array_equal(logits[1], expected[1])


@pytest.mark.parametrize("length", [8, 36, 40])  # one chunk of 8 tokens; four and a rest; five
def test_the_feed_forward_goes_in_chunks_that_equal_the_whole(pair, length, monkeypatch):
    layer = pair[1].layers[0]
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 64)), jnp.float32)
    monkeypatch.setattr(llama, "FEED_FORWARD_TOKENS", 16)
    chunked = jax.make_jaxpr(layer._feed_forward_in_chunks)(hidden)
    assert "f32[2,8,96]" in str(chunked)
    assert (f"f32[2,{length},96]" in str(chunked)) == (length == 8)
    out = jax.jit(layer._feed_forward_in_chunks)(hidden)
    np.testing.assert_allclose(out, layer._feed_forward(hidden), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_as_transformers(pair, tmp_path, dtype):
    reference, model = pair
    tokens = random_tokens(4, 48)
    exact = torch_logits(reference, tokens)
    half = LlamaForCausalLM(reference.config)
    half.load_state_dict(reference.state_dict())
    half = half.to(getattr(torch, dtype)).eval()
    model = saved_and_loaded(half, tmp_path)
    assert model.dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}

    logits = forward(model, tokens)
    assert logits.dtype == jnp.float32
    ours, theirs = (np.square(half - exact).mean() ** 0.5 for half in (logits, torch_logits(half, tokens)))
    assert ours < 1.2 * theirs < 0.1 * exact.std()
    _, steps, caches = cached_logits(model, tokens[:, :36], np.full(4, 36), tokens[:, 36:])
    assert np.square(steps - exact[:, 36:]).mean() ** 0.5 < 1.5 * theirs
    assert caches[0].dtype == jnp.dtype(dtype)


def test_layers_are_of_one_structure(pair):
    _, model = pair
    graphs = {nnx.graphdef(layer) for layer in model.layers}
    assert len(graphs) == 1
    traces: list[None] = []

    @nnx.jit
    def run(layer, hidden, lengths):
        traces.append(None)
        return layer(hidden, lengths)

    for layer in model.layers:
        run(layer, jnp.ones((1, 4, 64)), jnp.array([4]))
    assert len(traces) == 1


def test_a_model_can_be_made_from_random_numbers():
    config = ModelConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        max_position_embeddings=32,
    )  # fmt: skip
    model = nnx.jit(lambda: Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))()
    loss = nnx.jit(nnx.value_and_grad(lambda model, tokens: model(tokens).mean()))
    value, gradients = loss(model, jnp.ones((1, 4), jnp.int32))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_caches_have_the_model_s_shape(pair):
    _, model = pair
    caches = model.init_cache(DENSE, batch=3, capacity=50)
    assert len(caches) == len(model.layers)
    assert {(c.batch, c.capacity, c.num_kv_heads, c.head_dim) for c in caches} == {(3, 50, 2, 16)}
    assert {cache.dtype for cache in caches} == {jnp.dtype("float32")}


def test_a_packed_cache_gets_the_rotary_frequencies(tmp_path):
    model = saved_and_loaded(tiny_llama(head_dim=32), tmp_path)
    config = CompressionConfig(k_sparsity=0.5, v_sparsity=0.5, center_keys=True)
    caches = jax.jit(lambda: model.init_cache(config, batch=1, capacity=64))()
    np.testing.assert_array_equal(caches[0].inv_freq, rope_frequencies(model.config))


@pytest.mark.parametrize("variant", ["llama-2", "llama-3.1", "linear-scaling"])
def test_rope_frequencies_equal_transformers(variant, tmp_path):
    reference = tiny_llama(head_dim=128, **VARIANTS[variant])
    rotary = reference.model.rotary_emb
    model = saved_and_loaded(reference, tmp_path)
    np.testing.assert_allclose(rope_frequencies(model.config), rotary.inv_freq.numpy(), rtol=5e-7)
    assert rotary.rope_type == "default" or rotary.rope_type in ROPE_INIT_FUNCTIONS


def test_rope_frequencies_are_computed_once(pair):
    config = pair[1].config
    frequencies = rope_frequencies(config)
    assert frequencies is rope_frequencies(dataclasses.replace(config))
    assert not frequencies.flags.writeable
