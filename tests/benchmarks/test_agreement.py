import dataclasses
import json

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
        assert 0 < found["rms"] < 10


def test_bars_are_held_or_missed():
    def found(gap):
        return {"step": 3, "gap": gap, "rms": 2.0}

    small, large = np.full(10, 0.009), np.full(10, 0.011)
    held = agreement.judge(small, [None, found(0.11)], layers=4)
    assert held == {
        "rms": pytest.approx(0.009), "bar": 0.01, "dense_rms": None, "gap_bar": 0.06,
        "forced": True, "greedy": True, "passed": True,
    }  # fmt: skip
    assert agreement.judge(large, [None], layers=4, expected=0.0089)["passed"]
    assert not agreement.judge(large, [None], layers=4, expected=0.0087)["passed"]
    assert agreement.judge(large, [None], layers=4, expected=1.0)["bar"] == pytest.approx(0.02)
    assert not agreement.judge(large, [None], layers=4)["passed"]
    assert not agreement.judge(small, [None, found(0.13)], layers=4)["passed"]


def test_the_program_writes_what_it_finds_and_fails_where_a_bar_is_missed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "BAR", -1.0)
    path = tmp_path / "agreement.json"
    sizes = ["--shape", "tiny", "--prompt", "40", "--steps", "4", "--implementation", "xla", "--output", str(path)]
    with pytest.raises(SystemExit, match="do not agree"):
        agreement.main(sizes)
    written = json.loads(path.read_text())
    assert (written["passed"], written["rms"], len(written["ratios"])) == (False, 0, 4)
    assert "greedy, row 0: no difference" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_kernels_agree_with_xla(model, tokens):
    names = {"implementation": None, "reference": "xla"}
    ratios = agreement.forced(model, tokens, PROMPT, CONFIG, **names)
    different = agreement.free(model, tokens[:, :PROMPT], STEPS, CONFIG, **names)
    expected = agreement.dense_rms(model, tokens, PROMPT)
    assert expected is not None
    verdict = agreement.judge(ratios, different, layers=1, expected=expected)
    assert verdict["passed"], verdict
