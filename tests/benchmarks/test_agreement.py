import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from benchmarks import agreement, generation
from mustafar_jax import attention, cache

CONFIG = mj.CompressionConfig.recommended(0.7, 0.7)
PROMPT, STEPS = 70, 100  # past the boundaries of three groups
SAME = {"implementation": "xla", "reference": "xla"}


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(generation.SHAPES["tiny"], head_dim=64)
    return agreement.louder(generation.random_model(config))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, (2, PROMPT + STEPS))


def test_logits_are_those_after_each_given_token(model, tokens):
    logits = agreement.forced_logits(model, tokens, PROMPT, CONFIG, "xla")
    assert logits.shape == (STEPS, 2, 64)
    likelihoods = mj.log_likelihoods(model, tokens, prompt_length=PROMPT, config=CONFIG)
    given = np.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[:, PROMPT + 1 :].T[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(given.T, likelihoods[:, 1:], atol=0.15)  # bfloat16; they lie between -1 and -7


def test_one_implementation_agrees_with_itself(model, tokens):
    assert agreement.forced(model, tokens, PROMPT, CONFIG, **SAME).tolist() == [0] * STEPS
    assert agreement.free(model, tokens[:, :PROMPT], STEPS, CONFIG, **SAME) == [None, None]


def test_a_difference_is_found(model, tokens, monkeypatch):
    def wrong_from_a_length_on(query, held, scale, window):
        out = attention._PACKED["xla"](query, held, scale, window)
        return jax.tree.map(lambda x: jnp.where(held.lengths[:1] > PROMPT + 20, 0 * x, x), out)

    monkeypatch.setitem(attention._PACKED, "triton", wrong_from_a_length_on)
    monkeypatch.setitem(cache._PACK, "triton", cache._pack_xla)
    names = {"implementation": ("triton", "triton"), "reference": "xla"}  # a name alone would be tried on a CPU
    ratios = agreement.forced(model, tokens, PROMPT, CONFIG, **names)
    assert (ratios[:20] == 0).all()
    assert (ratios[20:] > 1e-3).all()
    for found in agreement.free(model, tokens[:, :PROMPT], STEPS, CONFIG, **names):
        assert found is not None
        assert found["step"] > 20
        assert found["gap"] > 0


@pytest.mark.gpu
def test_the_kernels_agree_with_xla(model, tokens):
    names = {"implementation": "triton", "reference": "xla"}
    assert agreement.forced(model, tokens, PROMPT, CONFIG, **names).max() < 2e-2
    for found in agreement.free(model, tokens[:, :PROMPT], STEPS, CONFIG, **names):
        assert found is None or found["gap"] < 0.05
