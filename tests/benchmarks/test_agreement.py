import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from benchmarks import agreement, generation_cases, generation_measure
from mustafar_jax import attention
from mustafar_jax.backend import Operation
from mustafar_jax.backends.xla.attention import attend_packed
from mustafar_jax.backends.xla.backend import XLA
from tests.helpers import replace_backend

CONFIG = mj.CompressionConfig.recommended(0.7, 0.7)
PROMPT, STEPS = 70, 100  # past the boundaries of three groups
SAME = {"implementation": "xla", "reference": "xla"}


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(generation_cases.SHAPES["tiny"], head_dim=64)
    return agreement.louder(generation_measure.random_model(config))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, (2, PROMPT + STEPS))


@pytest.mark.exhaustive
def test_logits_are_those_after_each_given_token(model, tokens):
    logits = agreement.forced_logits(model, tokens, PROMPT, CONFIG, "xla")
    assert logits.shape == (STEPS, 2, 64)
    likelihoods = mj.log_likelihoods(model, tokens, prompt_length=PROMPT, config=CONFIG)
    given = np.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[:, PROMPT + 1 :].T[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(given.T, likelihoods[:, 1:], atol=0.15)  # bfloat16; they lie between -1 and -7


@pytest.mark.exhaustive
def test_one_implementation_agrees_with_itself(model, tokens):
    ratios, expected = agreement.forced(model, tokens, PROMPT, CONFIG, **SAME)
    assert ratios.tolist() == [0] * STEPS
    assert expected > 0
    assert agreement.free(model, tokens[:, :PROMPT], STEPS, CONFIG, **SAME) == [None, None]


@pytest.mark.exhaustive
def test_a_difference_is_found(model, tokens, monkeypatch):
    def wrong_from_a_length_on(operands):
        out = attend_packed(operands)
        return jnp.where(operands.lengths[:1] > PROMPT + 20, 0 * out, out)

    replace_backend(
        monkeypatch, "triton", needs_cuda=False, attend_packed=Operation(wrong_from_a_length_on), pack=XLA.pack
    )
    names = {"implementation": "triton", "reference": "xla"}
    ratios, _ = agreement.forced(model, tokens, PROMPT, CONFIG, **names)
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

    ratios, layers = np.full(10, 0.01), np.full(4, 0.004)
    held = agreement.judge(ratios, [None, found(0.14)], layers, 0.01)
    assert held == {
        "attention_rms": pytest.approx(0.004), "attention": True,
        "rms": pytest.approx(0.01), "bar": 0.0125, "expected_rms": 0.01, "gap_bar": pytest.approx(0.075),
        "forced": True, "greedy": True, "passed": True,
    }  # fmt: skip
    assert agreement.judge(ratios, [None], layers, 0.0081)["passed"]
    assert not agreement.judge(ratios, [None], layers, 0.0079)["passed"]
    assert not agreement.judge(ratios, [None, found(0.16)], layers, 0.01)["passed"]
    assert not agreement.judge(ratios, [None], 1.3 * layers, 0.01)["passed"]


def test_attention_is_off_by_what_is_asked_at_random():
    attended = jax.random.normal(jax.random.key(0), (3, 8, 64), jnp.float32) * jnp.array([1.0, 10, 0])[:, None, None]
    project = agreement._Off(lambda x: x, 5e-3)
    off = project(attended) - attended
    ratios = np.linalg.norm(off[:2], axis=-1) / np.linalg.norm(attended[:2], axis=-1)
    np.testing.assert_allclose(ratios, 5e-3, rtol=0.35)
    assert (off[2] == 0).all()
    assert not np.allclose(project(2 * attended) - 2 * attended, 2 * off, atol=1e-2)  # other noise


@pytest.mark.exhaustive
def test_a_decoder_takes_the_place_of_the_model_after_the_prompt(model, tokens):
    zero = agreement.off_by(model, 0.0)
    plain, same, off = (
        agreement.forced_logits(model, tokens, PROMPT, CONFIG, "xla", decoder=decoder)
        for decoder in (None, zero, agreement.off_by(model, 0.5))
    )
    np.testing.assert_array_equal(plain, same)
    assert (agreement.error_ratios(off, plain) > 0.01).all()


@pytest.mark.exhaustive
def test_attention_is_compared_layer_by_layer(model, tokens, monkeypatch):
    def off_by_a_hundredth(operands):
        return 1.01 * attend_packed(operands)

    attention._decode.clear_cache()  # of what another test had here by the same name
    replace_backend(monkeypatch, "triton", needs_cuda=False, attend_packed=Operation(off_by_a_hundredth), pack=XLA.pack)
    names = "triton"
    ratios = agreement.attention_ratios(model, tokens, CONFIG, implementation=names, reference="xla")
    assert ratios.shape == (model.config.num_layers,)
    np.testing.assert_allclose(ratios, 0.01, rtol=0.2)  # bfloat16
    assert agreement.attention_ratios(model, tokens, CONFIG, **SAME).tolist() == [0] * model.config.num_layers


@pytest.mark.exhaustive
def test_what_is_expected_grows_with_the_error_of_attention(model, tokens, monkeypatch):
    def expected(error):
        monkeypatch.setattr(agreement, "BAR", error)
        return agreement.forced(model, tokens, PROMPT, CONFIG, **SAME)[1]

    assert expected(5e-3) < 0.5 * expected(0.1)


@pytest.mark.exhaustive
def test_the_program_writes_what_it_finds_and_fails_where_a_bar_is_missed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "MARGIN", -1.0)
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
    ratios, expected = agreement.forced(model, tokens, PROMPT, CONFIG, **names)
    different = agreement.free(model, tokens[:, :PROMPT], STEPS, CONFIG, **names)
    layers = agreement.attention_ratios(model, tokens, CONFIG, **names)
    verdict = agreement.judge(ratios, different, layers, expected)
    assert verdict["passed"], verdict
