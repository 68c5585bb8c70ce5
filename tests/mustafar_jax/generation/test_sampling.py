"""Which token is drawn."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mustafar_jax as mj
from mustafar_jax.generation import sampling
from tests.mustafar_jax.generation.setting import always


def test_the_same_key_draws_the_same_tokens_and_another_key_others():
    model, prompts = always([0.0] * 1000), np.zeros((2, 1), int)
    draw = functools.partial(mj.generate, model, prompts, max_new_tokens=20, temperature=1.0)
    first = draw(key=jax.random.key(0)).tokens
    np.testing.assert_array_equal(first, draw(key=jax.random.key(0)).tokens)
    assert (first != draw(key=jax.random.key(1)).tokens).mean() > 0.9


def test_every_step_and_every_row_draws_with_its_own_key():
    model, prompts = always([0.0] * 1000), np.zeros((8, 1), int)
    tokens = mj.generate(model, prompts, max_new_tokens=8, temperature=1.0, key=jax.random.key(0)).tokens
    assert len(np.unique(tokens)) > 56  # of 64 draws; about two pairs of a thousand tokens meet by chance


DRAWS = 8192


LOGITS = np.array([1.0, -1.0, 0.5, 2.0, 0.0, -3.0])


def draw(logits, over, **options):
    """Many independent draws from the same logits: by the rows of one step, or by the steps of one row."""
    options |= {"key": jax.random.key(11)}
    batch, steps = (DRAWS, 1) if over == "rows" else (1, DRAWS)
    result = mj.generate(always(logits), np.zeros((batch, 1), int), max_new_tokens=steps, **options)
    return np.asarray(result.tokens).ravel()


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def assert_frequencies(tokens, probabilities):
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
    assert (counts[expected == 0] == 0).all()
    chi_squared = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_squared < 30  # with up to five degrees of freedom, true draws pass this once in 70,000 keys


@pytest.mark.parametrize("over", ["rows", "steps"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature, over):
    assert_frequencies(draw(LOGITS, over, temperature=temperature), softmax(LOGITS / temperature))


@pytest.mark.parametrize("over", ["rows", "steps"])
def test_the_nucleus_is_taken_after_the_temperature_and_draws_stay_in_it(over):
    # Probabilities of 0.59, 0.22, 0.13, ... at temperature 1; of 0.37, 0.25, 0.20, ... at 2.5.
    first_two, first_three = [True, False, False, True, False, False], [True, False, True, True, False, False]
    for temperature, inside in ((1.0, first_two), (2.5, first_three)):
        probabilities = np.where(inside, softmax(LOGITS / temperature), 0)
        tokens = draw(LOGITS, over, temperature=temperature, top_p=0.7)
        assert_frequencies(tokens, probabilities / probabilities.sum())


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    top_p=st.floats(2**-10, 1, width=32),
)
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p(logits, top_p):
    # Padded to one shape, so that one compilation serves: what is added has no probability.
    padded = np.pad(np.asarray(logits, np.float32), (0, 12 - len(logits)), constant_values=-np.inf)
    kept = np.isfinite(nucleus(padded[None], top_p)[0])
    np.testing.assert_array_equal(nucleus(padded[None], top_p)[0][kept], padded[kept])
    probabilities = softmax(padded)
    inside, outside = probabilities[kept], probabilities[~kept]
    rounding = 1e-6
    assert inside.sum() >= top_p - rounding
    assert inside.sum() - inside.min() < top_p + rounding  # without the least likely of them it would not
    assert not len(outside) or inside.min() >= outside.max() - rounding


@jax.jit
def nucleus(logits, top_p):
    return sampling.likeliest(logits, 1 << 30, top_p, 0.0)


def by_the_formulas(logits, top_k, top_p, min_p):
    """Which tokens stay: those of the k largest, of these the fewest that reach top_p, of these what min_p leaves."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    probabilities = softmax(np.asarray(logits, np.float64)[order])
    reached = np.concatenate([[0], np.cumsum(probabilities)[:-1]])
    # What lies within a rounding of a bound may go either way.
    sure = [max(abs(reached - top_p).min(), 0), abs(probabilities - min_p * probabilities[0])[1:].min(initial=1)]
    stays = (reached < top_p) & (probabilities >= min_p * probabilities[0])
    stays[0] = True
    return sorted(np.asarray(order)[stays].tolist()), min(sure) > 1e-5


@given(
    logits=st.lists(st.one_of(st.floats(-8, 8, width=16), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12),
    top_k=st.integers(1, 14),
    top_p=st.floats(2**-6, 1, width=32),
    min_p=st.floats(0, 1, width=32),
)
def test_what_stays_is_what_the_formulas_say(logits, top_k, top_p, min_p):
    wanted, sure = by_the_formulas(logits, top_k, top_p, min_p)
    hypothesis.assume(sure)
    padded = np.pad(np.asarray(logits, np.float32), (0, 14 - len(logits)), constant_values=-np.inf)
    kept = np.isfinite(likeliest(padded[None], top_k, top_p, min_p)[0])
    assert np.flatnonzero(kept).tolist() == wanted


likeliest = jax.jit(sampling.likeliest)


@pytest.mark.parametrize(
    ("options", "inside"), [({"top_k": 2}, [0, 3]), ({"min_p": 0.2}, [0, 2, 3]), ({"top_k": 5, "min_p": 0.3}, [0, 3])]
)
def test_draws_stay_in_what_is_left_of_them(options, inside):
    # Probabilities of 0.59, 0.22, 0.13, ...
    probabilities = np.where(np.isin(np.arange(len(LOGITS)), inside), softmax(LOGITS), 0)
    tokens = draw(LOGITS, "rows", temperature=1.0, **options)
    assert_frequencies(tokens, probabilities / probabilities.sum())


@pytest.mark.parametrize("temperature", [3.5e38, 1e300])
def test_a_temperature_beyond_float32_draws_all_tokens_alike_but_those_that_must_not_come(temperature):
    options = {"temperature": temperature, "eos_id": 3, "min_new_tokens": 1}
    probabilities = np.where(np.arange(len(LOGITS)) == 3, 0, 1 / (len(LOGITS) - 1))
    assert_frequencies(draw(LOGITS, "rows", **options), probabilities)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1e-6},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 1e-3},
        {"temperature": 1e-30},
        {"temperature": 1e-44},
    ],
)
def test_the_limits_of_both_options_are_the_likeliest_token(options):
    assert (draw(LOGITS * 50, "rows", **{"temperature": 1.0} | options) == 3).all()
