"""Logits that are not finite: which sequence they end, at which step, and that the others do not feel it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mustafar_jax as mj
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.text import Returned
from mustafar_jax.models import Llama
from tests.helpers import CONFIGS, exhaustive
from tests.mustafar_jax.generation.setting import LENGTHS, PROMPTS, TINY, Context, Lookup, counting

NEW = 40
PROMPT = [[10], [30], [58]]


def counting_up_to(token: int, logits: Any) -> Lookup:
    """`counting` with these logits after a token."""
    return Lookup(counting().table.at[token].set(logits), Context(100, 100))


@pytest.mark.parametrize(
    "bad", [np.nan, np.inf, -np.inf, [0.0] * 7 + [np.nan] + [0.0] * 92], ids=["nan", "inf", "-inf", "one"]
)
@pytest.mark.parametrize("at", [30, 31, 47, 60])
def test_a_sequence_without_logits_ends_there_and_the_others_go_on(bad, at):
    model, reach = counting_up_to(at, bad), at - np.ravel(PROMPT)
    lengths = np.where(reach < 0, NEW, np.minimum(reach, NEW))
    wanted = np.where(np.arange(NEW) < lengths[:, None], np.array(PROMPT) + 1 + np.arange(NEW), 0)
    result = mj.generate(model, PROMPT, max_new_tokens=NEW)
    np.testing.assert_array_equal(result.tokens, wanted)
    assert result.lengths.tolist() == lengths.tolist()
    assert result.finite.tolist() == (lengths == NEW).tolist()
    steps = Returned(mj.stream(model, PROMPT, max_new_tokens=NEW))
    np.testing.assert_array_equal(np.stack(list(steps), axis=1), wanted)
    jax.tree.map(np.testing.assert_array_equal, steps.value, result)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1, "top_p": 0.9, "key": jax.random.key(0)}])
def test_tokens_that_a_model_rules_out_are_no_fault(options):
    model = counting_up_to(10, jnp.where(jnp.arange(100) == 11, 0, -jnp.inf))
    result = mj.generate(model, [[10]], max_new_tokens=1, **options)
    assert (result.tokens.tolist(), result.finite.tolist()) == ([[11]], [True])


@pytest.mark.parametrize("at", [30, 33])
def test_a_stream_of_which_no_sequence_is_left_raises(at):
    model, written = counting_up_to(at, jnp.nan), []
    message = f"the model's logits are not finite: those of sequence 0 from step {at - 29} on$"
    with pytest.raises(ValueError, match=message):
        written.extend(mj.stream(model, [[30]], max_new_tokens=NEW))
    assert np.ravel(written).tolist() == list(range(31, at + 1))
    result = mj.generate(model, [[30]], max_new_tokens=NEW)
    assert (result.lengths.tolist(), result.finite.tolist()) == ([at - 30], [False])


def test_what_has_stopped_is_not_looked_at():
    result = mj.generate(counting_up_to(32, jnp.nan), [[30], [50]], max_new_tokens=NEW, eos_id=32)
    assert (result.lengths.tolist(), result.finite.tolist()) == ([2, NEW], [True, True])


@pytest.fixture(scope="module")
def poisoned(one_layer) -> Llama:
    """A model for which token 60 is NaN, and which never writes it."""
    model = nnx.clone(one_layer)
    model.embed_tokens.embedding[...] = model.embed_tokens.embedding[...].at[60].set(jnp.nan)
    model.lm_head.kernel[...] = model.lm_head.kernel[...].at[60].set(0)
    return model


@pytest.mark.parametrize("name", ["dense", *exhaustive("recommended", "pruned in 8 bits", "published")])
def test_one_sequence_s_nan_does_not_touch_the_others(poisoned, name):
    clean = np.where(PROMPTS == 60, 59, PROMPTS)
    options: dict[str, Any] = {"lengths": LENGTHS, "max_new_tokens": NEW, "config": CONFIGS[name]}
    wanted = mj.generate(poisoned, clean, **options)
    assert wanted.finite.all()
    broken = np.where(np.arange(clean.shape[1]) < LENGTHS[:, None], clean, 60)  # the padding
    broken[2, LENGTHS[2] - 5] = 60
    result = mj.generate(poisoned, broken, **options)
    assert result.finite.tolist() == [True, True, False, True]
    assert result.lengths.tolist() == [NEW, NEW, 0, NEW]
    others = [0, 1, 3]
    np.testing.assert_array_equal(result.tokens[jnp.array(others)], wanted.tokens[jnp.array(others)])


def test_float16_that_overflows_is_told_of_with_what_helps():
    model = Llama(TINY, dtype=jnp.float16, rngs=nnx.Rngs(0))
    model.layers[0].mlp.down_proj.kernel[...] = jnp.full_like(model.layers[0].mlp.down_proj.kernel[...], 6e4)
    model.layers[0].mlp.up_proj.kernel[...] *= 1000
    message = "not finite: those of sequence 0 from step 1 on; float16 holds no number beyond 65504: try bfloat16$"
    with pytest.raises(ValueError, match=message):
        list(mj.stream(model, PROMPTS[3:], max_new_tokens=2))


@pytest.mark.parametrize("config", [None, *exhaustive(CompressionConfig.recommended())])
def test_texts_that_have_no_likelihood_are_named(poisoned, config):
    texts = np.where(PROMPTS == 60, 59, PROMPTS)
    texts[1, 50] = texts[2, 60] = 60  # the second one is given from step 11 on, and so is predicted from at step 12
    message = "not finite: those of text 1 from step 12 on, of text 2 from step 22 on$"
    with pytest.raises(ValueError, match=message):
        mj.log_likelihoods(poisoned, texts, prompt_length=40, config=config)
