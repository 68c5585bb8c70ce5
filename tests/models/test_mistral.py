import dataclasses

import numpy as np
import pytest

from mustafar_jax.config import CompressionConfig
from tests.models.reference import (
    TOLERANCE,
    cached_logits,
    forward,
    random_tokens,
    saved_and_loaded,
    torch_logits,
)
from tests.models.variants import tiny_model


def test_the_window_matters(tmp_path):
    reference = tiny_model("mistral-0.1")
    model = saved_and_loaded(reference, tmp_path)
    whole = dataclasses.replace(model.config, sliding_window=None)
    assert (model.config.sliding_window, whole.sliding_window) == (24, None)
    tokens = random_tokens(1, 64)
    model.config = whole
    for layer in model.layers:
        layer.self_attn.config = whole
    difference = np.abs(forward(model, tokens) - torch_logits(reference, tokens)).max(axis=(0, 2))
    assert difference[:24].max() < TOLERANCE < difference[24:].min()


@pytest.mark.exhaustive
def test_a_packed_cache_with_every_entry_kept_equals_the_dense_one_far_past_the_window(tmp_path):
    model = saved_and_loaded(tiny_model("mistral-0.1", sliding_window=48, head_dim=32), tmp_path)
    prompts, lengths, continuation = random_tokens(2, 40), np.array([40, 29]), random_tokens(2, 248)
    _, dense, _ = cached_logits(model, prompts, lengths, continuation, capacity=288)
    config = CompressionConfig(k_sparsity=0.001, v_sparsity=0.001)
    _, packed, caches = cached_logits(model, prompts, lengths, continuation, config, capacity=288)
    assert all((config.packed_tokens(cache.lengths) >= 200).all() for cache in caches)
    np.testing.assert_allclose(packed, dense, atol=TOLERANCE, rtol=0)
