import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mustafar_jax.config import CompressionConfig
from mustafar_jax.models import Llama, ModelConfig, llama
from mustafar_jax.models.config import rope_frequencies
from tests.models.reference import (
    DENSE,
    TOLERANCE,
    VOCABULARY,
    forward,
    random_tokens,
    saved_and_loaded,
)
from tests.models.variants import tiny_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same weights in transformers and here."""
    reference = tiny_model("llama-3.1")
    return reference, saved_and_loaded(reference, tmp_path_factory.mktemp("llama"))


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
    model = saved_and_loaded(tiny_model("llama-2", head_dim=32), tmp_path)
    config = CompressionConfig(k_sparsity=0.5, v_sparsity=0.5, center_keys=True)
    caches = jax.jit(lambda: model.init_cache(config, batch=1, capacity=64))()
    np.testing.assert_array_equal(caches[0].inv_freq, rope_frequencies(model.config))


@pytest.mark.parametrize("variant", ["llama-2", "llama-3.1", "linear-scaling"])
def test_rope_frequencies_equal_transformers(variant, tmp_path):
    reference = tiny_model(variant, head_dim=128)
    rotary = reference.model.rotary_emb
    model = saved_and_loaded(reference, tmp_path)
    np.testing.assert_allclose(rope_frequencies(model.config), rotary.inv_freq.numpy(), rtol=5e-7)
    assert rotary.rope_type == "default" or rotary.rope_type in ROPE_INIT_FUNCTIONS


def test_rope_frequencies_are_computed_once(pair):
    config = pair[1].config
    frequencies = rope_frequencies(config)
    assert frequencies is rope_frequencies(dataclasses.replace(config))
    assert not frequencies.flags.writeable
