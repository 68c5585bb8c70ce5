"""Every family's logits are those of transformers, without a cache and through one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mustafar_jax.models.checkpoint import MODELS
from tests.helpers import exhaustive
from tests.models.reference import TOLERANCE, cached_logits, forward, random_tokens, saved_and_loaded, torch_logits
from tests.models.variants import VARIANTS, tiny_model

WITHOUT_AND_WITH_WINDOW = ["llama-3.1", "mistral-0.1"]
FURTHER = ["llama-2", "llama-3", "llama-3.2", "linear-scaling", "mistral-0.2", "mistral-0.3", "qwen2.5", "qwen2-window"]
FURTHER += ["qwen3"]
"""What they say beside their family's other variants, these say as well, or variants of another family."""
OTHERS = [name for name in VARIANTS if name not in WITHOUT_AND_WITH_WINDOW]


@pytest.mark.parametrize("variant", [*(name for name in VARIANTS if name not in FURTHER), *exhaustive(*FURTHER)])
def test_logits_equal_transformers(variant, tmp_path):
    reference = tiny_model(variant)
    model = saved_and_loaded(reference, tmp_path)
    assert type(model) is MODELS[reference.config.model_type]
    tokens = random_tokens(2, 100)
    wanted = torch_logits(reference, tokens)
    assert wanted.std() > 0.5

    whole = forward(model, tokens)
    prompt, steps, caches = cached_logits(model, tokens[:, :36], np.array([36, 36]), tokens[:, 36:])

    np.testing.assert_allclose(whole, wanted, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(prompt, wanted[:, :36], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(steps, wanted[:, 36:], atol=TOLERANCE, rtol=0)
    assert [cache.lengths.tolist() for cache in caches] == [[100, 100]] * len(model.layers)


@pytest.mark.parametrize("variant", ["mistral-0.1", *exhaustive("llama-3.1", *OTHERS)])
def test_a_ragged_batch_equals_its_prompts_one_by_one(variant, tmp_path):
    reference = tiny_model(variant)
    model = saved_and_loaded(reference, tmp_path)
    lengths = np.array([3, 23, 24, 40])  # the windows end at a step of their own in each row, or within the prompt
    prompts, continuation = random_tokens(4, 40), random_tokens(4, 64)[::-1]
    prompt, steps, _ = cached_logits(model, prompts, lengths, continuation)
    for row, length in enumerate(lengths):
        wanted = torch_logits(reference, np.concatenate([prompts[row, :length], continuation[row]])[None])[0]
        np.testing.assert_allclose(prompt[row, :length], wanted[:length], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(steps[row], wanted[length:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("llama-3.1", "float16"),
        *exhaustive(("qwen3", "bfloat16"), ("llama-3.1", "bfloat16")),
        *exhaustive(*itertools.product(["mistral-0.1", "qwen2", "qwen3-window-and-biases"], ["bfloat16", "float16"])),
    ],
)
def test_half_precision_is_as_close_as_transformers(variant, dtype, tmp_path):
    reference = tiny_model(variant)
    tokens = random_tokens(4, 48)
    exact = torch_logits(reference, tokens)
    half = type(reference)(reference.config)
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


def test_every_family_has_its_variants():
    assert {model_class.__name__ for model_class, _ in VARIANTS.values()} == {
        model_class.architecture for model_class in MODELS.values()
    }
