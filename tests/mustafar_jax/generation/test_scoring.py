"""How likely given texts are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mustafar_jax as mj
from mustafar_jax.cache import PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import DENSE, prefill, prefill_prompt, scoring
from tests.helpers import exhaustive
from tests.mustafar_jax.generation.setting import (
    CAPACITY,
    CONFIGS,
    LENGTHS,
    PROMPTS,
    TINY,
    VOCABULARY,
    Compilations,
    Context,
    Flagging,
    Overflowing,
    counting,
    decode,
)


@pytest.mark.exhaustive
def test_a_window_s_model_far_past_it_equals_its_dense_cache_where_every_entry_is_kept(mistral):
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 48 + 200 + 1))
    dense = mj.log_likelihoods(mistral, tokens, prompt_length=40)
    config = CompressionConfig.recommended(0.001, 0.001)
    packed = mj.log_likelihoods(mistral, tokens, prompt_length=40, config=config)
    np.testing.assert_allclose(packed, dense, atol=1e-4, rtol=0)
    # What these scores were read from: all but the latest tokens, packed with room for every entry.
    cache = jax.eval_shape(functools.partial(mistral.init_cache, config, batch=2, capacity=tokens.shape[1]))[0]
    assert isinstance(cache, PackedCache)
    for store in (cache.keys, cache.values):
        assert store.packed.bitmap is not None
        assert store.packed.shape[2] >= 192
        assert store.packed.slots == TINY.head_dim


@pytest.mark.parametrize("prompt_length", [1, *exhaustive(99)])
def test_log_likelihoods_equal_a_full_forward_pass(llama, prompt_length):
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (2, 100))
    scores = mj.log_likelihoods(llama, tokens, prompt_length=prompt_length)
    logits = nnx.jit(lambda model, tokens: model(tokens))(llama, tokens)
    wanted = np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[:, :, 0]
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, wanted[:, prompt_length - 1 :], atol=1e-4, rtol=0)


def test_log_likelihoods_see_the_compressed_cache(one_layer):
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (4, CAPACITY))
    config, start = CONFIGS["recommended"], PROMPTS.shape[1]
    scores = np.asarray(mj.log_likelihoods(one_layer, tokens, prompt_length=start, config=config))
    caches = one_layer.init_cache(config, batch=4, capacity=CAPACITY)
    logits, caches = prefill_prompt(one_layer, jnp.asarray(tokens[:, :start]), jnp.full(4, start, jnp.int32), caches)
    for step in range(start, CAPACITY):
        wanted = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, step, None], axis=-1)[:, 0]
        np.testing.assert_allclose(scores[:, step - start], wanted, atol=1e-4, rtol=0, err_msg=f"{step=}")
        logits, caches = decode(one_layer, jnp.asarray(tokens[:, step], jnp.int32), caches)
    assert caches[0].packed_lengths.tolist() == [96] * 4
    dense = mj.log_likelihoods(one_layer, tokens, prompt_length=start)
    assert np.abs(scores - dense).max() > 0.1


def test_log_likelihoods_raise_where_a_cache_overflows():
    model = Overflowing(counting().table, Context(100, 100), (Flagging(40), Flagging(7)))
    texts = [[3, 10, 4], [3, 7, 4], [3, 10, 7]]  # the last token is given to no cache
    with pytest.raises(ValueError, match=r"v_slots=None holds fewer entries than values of texts \[1\] need"):
        mj.log_likelihoods(model, texts, prompt_length=1)


@pytest.mark.exhaustive
def test_texts_prefilled_some_at_a_time_score_as_all_at_once(one_layer, monkeypatch):
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (5, 80))
    score = functools.partial(mj.log_likelihoods, one_layer, tokens, prompt_length=70)
    wanted = score()
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 2 * 96)  # three parts, the last of them moved back
    with Compilations() as compiled:
        scores = score()
    assert compiled.count("_prefill_rows") == 1
    np.testing.assert_allclose(scores, wanted, atol=1e-4, rtol=0)


def makers(model, configs, capacity):
    """What makes the caches of each config."""
    return [model.init_cache(config, batch=4, capacity=capacity).__getitem__ for config in configs]


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [34, *exhaustive(1, 33, 98)])
def test_tokens_in_blocks_pass_as_one_by_one_through_every_cache(llama, count):
    """Of no given token, of one block and one more, of one, of three and one more; after prompts of four lengths."""
    continuation = jnp.asarray(np.random.default_rng(4).integers(0, VOCABULARY, (4, count)))
    configs = [DENSE, CONFIGS["recommended"]]
    given = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS, jnp.int32), continuation
    calls: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        calls.append((done, total))

    states: dict[Any, list[jax.Array]] = {}
    for way in (scoring.by_tokens, scoring.by_blocks):
        made = makers(llama, configs, PROMPTS.shape[1] + count - 1)
        states[way], overflow = scoring.forced_states(llama, made, *given, way, report)
        assert not np.any(overflow)
    assert calls == [(1, 2), (2, 2)] * 2
    for blocks, tokens in zip(states[scoring.by_blocks], states[scoring.by_tokens], strict=True):
        assert blocks.shape == tokens.shape == (4, count, TINY.hidden_size)
        np.testing.assert_allclose(blocks, tokens, atol=1e-4, rtol=0)
    dense, compressed = states[scoring.by_blocks]
    assert (count == 1) == np.array_equal(compressed, dense)


@pytest.mark.exhaustive
def test_prompts_pass_once_for_all_caches_by_blocks(llama, monkeypatch):
    passed = []
    run = scoring._run_prompt
    monkeypatch.setattr(scoring, "_run_prompt", lambda *args: passed.append(args[0]) or run(*args))
    made = makers(llama, [DENSE, *CONFIGS.values()], 72)
    given = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS, jnp.int32), jnp.ones((4, 3), jnp.int32)
    scoring.forced_states(llama, made, *given, scoring.by_blocks)
    assert passed == list(llama.layers)


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", [scoring.by_blocks, *exhaustive(scoring.by_tokens)])
def test_what_overflows_is_what_given_tokens_pack(one_layer, way):
    """The 32nd token fills the first group, whose values do not fit; the continuation's last goes into no cache."""
    config = CompressionConfig(0, 0.5, v_method="channel_magnitude", v_slots=4, residual_length=0)
    made = makers(one_layer, [config, DENSE], 32)
    given = jnp.asarray(PROMPTS[:, :20]), jnp.array([19, 20, 20, 19]), jnp.asarray(PROMPTS[:, 20:33])
    _, [over, dense] = scoring.forced_states(one_layer, made, *given, way)
    assert over.tolist() == [False, True, True, False]
    assert not dense.any()


def test_every_layer_is_given_its_own_cache():
    model = Overflowing(counting().table, Context(100, 100), (Flagging(40), Flagging(7)))
    asked: list[int] = []

    def make(number):
        asked.append(number)
        return model.init_cache(None, batch=2, capacity=5)[number]

    given = jnp.array([[3, 10], [3, 10]]), jnp.array([2, 2]), jnp.array([[7, 1], [8, 7]])
    _, [overflow] = scoring.forced_states(model, [make], *given, scoring.by_tokens)
    assert asked == [0, 1]
    assert overflow.tolist() == [True, False]
