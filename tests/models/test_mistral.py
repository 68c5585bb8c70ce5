import dataclasses
from typing import Any

import numpy as np
import pytest
from transformers import MistralConfig, MistralForCausalLM

from mustafar_jax.config import CompressionConfig
from mustafar_jax.models import Mistral
from tests.models.reference import (
    TINY,
    TOLERANCE,
    cached_logits,
    forward,
    random_model,
    random_tokens,
    saved_and_loaded,
    torch_logits,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "v0.1": {"sliding_window": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "v0.2": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "v0.3": {"sliding_window": None, "head_dim": 32, "num_key_value_heads": 1},
}


def tiny_mistral(**overrides):
    return random_model(MistralForCausalLM, MistralConfig(**{**TINY, **overrides}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, tmp_path):
    reference = tiny_mistral(**VARIANTS[variant])
    model = saved_and_loaded(reference, tmp_path)
    assert type(model) is Mistral
    tokens = random_tokens(2, 100)
    wanted = torch_logits(reference, tokens)
    prompt, steps, _ = cached_logits(model, tokens[:, :36], np.array([36, 36]), tokens[:, 36:])

    np.testing.assert_allclose(forward(model, tokens), wanted, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(prompt, wanted[:, :36], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(steps, wanted[:, 36:], atol=TOLERANCE, rtol=0)


def test_decoding_passes_the_window_at_its_own_step_in_each_row(tmp_path):
    reference = tiny_mistral(sliding_window=24)
    model = saved_and_loaded(reference, tmp_path)
    lengths = np.array([3, 23, 24, 40])
    prompts, continuation = random_tokens(4, 40), random_tokens(4, 64)[::-1]
    _, steps, _ = cached_logits(model, prompts, lengths, continuation)
    for row, length in enumerate(lengths):
        tokens = np.concatenate([prompts[row, :length], continuation[row]])[None]
        np.testing.assert_allclose(steps[row], torch_logits(reference, tokens)[0, length:], atol=TOLERANCE, rtol=0)


def test_the_window_matters(tmp_path):
    reference = tiny_mistral(sliding_window=24)
    model = saved_and_loaded(reference, tmp_path)
    whole = dataclasses.replace(model.config, sliding_window=None)
    assert (model.config.sliding_window, whole.sliding_window) == (24, None)
    tokens = random_tokens(1, 64)
    model.config = whole
    for layer in model.layers:
        layer.self_attn.config = whole
    difference = np.abs(forward(model, tokens) - torch_logits(reference, tokens)).max(axis=(0, 2))
    assert difference[:24].max() < TOLERANCE < difference[24:].min()


def test_a_packed_cache_with_every_entry_kept_equals_the_dense_one_far_past_the_window(tmp_path):
    model = saved_and_loaded(tiny_mistral(sliding_window=48, head_dim=32), tmp_path)
    prompts, lengths, continuation = random_tokens(2, 40), np.array([40, 29]), random_tokens(2, 248)
    _, dense, _ = cached_logits(model, prompts, lengths, continuation, capacity=288)
    config = CompressionConfig(k_sparsity=0.001, v_sparsity=0.001)
    _, packed, caches = cached_logits(model, prompts, lengths, continuation, config, capacity=288)
    assert all((config.packed_tokens(cache.lengths) >= 200).all() for cache in caches)
    np.testing.assert_allclose(packed, dense, atol=TOLERANCE, rtol=0)
