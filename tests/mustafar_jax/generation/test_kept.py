"""Caches that outlast a call: what they hold, prompts that go on from them, and what is refused."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax.generation import DENSE, extend_prompt, prefill, prefill_prompt
from mustafar_jax.generation.text import Returned
from mustafar_jax.models import Llama
from tests.helpers import exhaustive, to_dense
from tests.mustafar_jax.generation.setting import (
    CONFIGS,
    LENGTHS,
    PROMPTS,
    TINY,
    VOCABULARY,
    Compilations,
    Context,
    Flagging,
    Overflowing,
    compressed,
    counting,
    decode,
    random_model,
)

NEW, CAPACITY = 24, 256
NEVER = [VOCABULARY] * 3
TURN = np.random.default_rng(5).integers(1, VOCABULARY, (4, 40), dtype=np.int32)
TURN_LENGTHS = np.array([40, 3, 17, 1])


def assert_caches(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        for held, expected in zip(to_dense(one), to_dense(other), strict=True):
            np.testing.assert_allclose(held, expected, atol=1e-4, rtol=0)


def through(model: Llama, caches: Any, result: mj.Generation) -> Any:
    """The caches, which hold the prompts, with the tokens of a result after them, each sequence by itself."""
    rows, caches = [], jax.tree.map(np.asarray, caches)
    for row, length in enumerate(result.lengths.tolist()):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], caches)
        for token in np.asarray(result.tokens)[row, :length]:
            _, one = decode(model, jnp.asarray([token], jnp.int32), one)
        rows.append(jax.tree.map(np.asarray, one))
    return jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *rows)


def filled(model: Llama, config: mj.CompressionConfig) -> Any:
    caches = model.init_cache(config, batch=4, capacity=CAPACITY)
    return prefill_prompt(model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS, jnp.int32), caches)[1]


@pytest.fixture(
    scope="module", params=[pytest.param("recommended"), pytest.param("dense", marks=pytest.mark.exhaustive)]
)
def setting(one_layer, request):
    """A config, what it first generates, and which tokens then stop sequences at several lengths."""
    config = CONFIGS.get(request.param, DENSE)
    options: dict[str, Any] = {"max_new_tokens": NEW, "config": config, "eos_id": NEVER, "capacity": CAPACITY}
    free = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, **options)
    return config, np.asarray(free.tokens)[[0, 1, 2], [3, 9, NEW - 1]].tolist()


@pytest.mark.exhaustive
def test_caches_hold_the_prompts_and_all_tokens_once_and_the_next_prompts_follow(one_layer, setting):
    config, stops = setting
    options: dict[str, Any] = {"max_new_tokens": NEW, "config": config, "eos_id": stops}
    first = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, capacity=CAPACITY, **options)
    assert len(set(first.lengths.tolist())) > 2
    assert first.caches is not None
    wanted = through(one_layer, filled(one_layer, config), first)
    assert first.caches[0].lengths.tolist() == (LENGTHS + np.asarray(first.lengths)).tolist()
    assert_caches(first.caches, wanted)

    _, grown = extend_prompt(
        one_layer, jnp.asarray(TURN), jnp.asarray(TURN_LENGTHS, jnp.int32), jax.tree.map(jnp.copy, wanted)
    )
    second = mj.generate(one_layer, TURN, lengths=TURN_LENGTHS, caches=first.caches, **options)
    assert second.caches is not None
    assert second.caches[0].lengths.tolist() == (grown[0].lengths + second.lengths).tolist()
    assert_caches(second.caches, through(one_layer, grown, second))

    steps = Returned(mj.stream(one_layer, TURN, lengths=TURN_LENGTHS, caches=wanted, **options))
    seen = np.stack(list(steps), axis=1)
    np.testing.assert_array_equal(seen, second.tokens[:, : seen.shape[1]])
    np.testing.assert_array_equal(steps.value.lengths, second.lengths)
    assert_caches(steps.value.caches, second.caches)


def test_turns_of_dense_caches_write_what_one_prompt_would(llama):
    first = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, capacity=CAPACITY)
    second = mj.generate(llama, TURN, lengths=TURN_LENGTHS, max_new_tokens=NEW, caches=first.caches)
    whole = np.zeros((4, 140), np.int32)
    lengths = LENGTHS + NEW + TURN_LENGTHS
    for row in range(4):
        parts = PROMPTS[row, : LENGTHS[row]], first.tokens[row], TURN[row, : TURN_LENGTHS[row]]
        whole[row, : lengths[row]] = np.concatenate(parts)
    wanted = mj.generate(llama, whole, lengths=lengths, max_new_tokens=NEW)
    np.testing.assert_array_equal(second.tokens, wanted.tokens)
    assert wanted.caches is None


@pytest.mark.parametrize("shown", exhaustive(1, 2, NEW))
def test_a_stream_that_is_told_to_stop_leaves_what_was_shown(one_layer, shown):
    config = CONFIGS["recommended"]
    options: dict[str, Any] = {"max_new_tokens": NEW, "config": config, "eos_id": NEVER, "capacity": CAPACITY}
    steps = mj.stream(one_layer, PROMPTS, lengths=LENGTHS, **options)
    seen = [next(steps) for _ in range(shown)]
    with pytest.raises(StopIteration) as end:
        steps.send(True)
    result = end.value.value
    assert result.lengths.tolist() == [shown] * 4
    np.testing.assert_array_equal(result.tokens[:, :shown], np.stack(seen, axis=1))
    assert not result.tokens[:, shown:].any()
    assert_caches(result.caches, through(one_layer, filled(one_layer, config), result))


def test_a_stream_that_keeps_nothing_stops_as_well():
    steps = mj.stream(counting(), [[3], [10]], max_new_tokens=9)
    assert [next(steps).tolist(), next(steps).tolist()] == [[4, 11], [5, 12]]
    with pytest.raises(StopIteration) as end:
        steps.send(True)
    assert end.value.value.tokens.tolist() == [[4, 5, *[0] * 7], [11, 12, *[0] * 7]]
    assert end.value.value.lengths.tolist() == [2, 2]


def test_later_turns_compile_nothing(one_layer):
    options: dict[str, Any] = {"max_new_tokens": NEW, "config": CONFIGS["recommended"], "eos_id": NEVER}
    result = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, capacity=CAPACITY, **options)
    result = mj.generate(one_layer, TURN[:, :1], caches=result.caches, **options)
    with Compilations() as compiled:
        for length in (33, 40):
            turn = TURN[:, :length].tolist()
            result = mj.generate(one_layer, turn, caches=result.caches, capacity=CAPACITY, **options)
    assert compiled == []
    assert result.caches is not None
    assert result.caches[0].lengths.tolist() == (LENGTHS + 1 + 33 + 40 + 4 * NEW).tolist()


@pytest.mark.exhaustive
@compressed
def test_prompts_that_go_on_some_at_a_time_equal_all_at_once(llama, config, monkeypatch):
    prompts, lengths = (jnp.asarray(np.concatenate([x, x[:1]]), jnp.int32) for x in (TURN, TURN_LENGTHS))
    before = jax.tree.map(lambda leaf: jnp.asarray(np.concatenate([leaf, leaf[:1]])), filled(llama, config))
    logits, caches = extend_prompt(llama, prompts, lengths, jax.tree.map(jnp.copy, before))
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 2 * TURN.shape[1])  # three parts, the last of them moved back
    in_parts, caches_in_parts = extend_prompt(llama, prompts, lengths, before)
    np.testing.assert_allclose(in_parts, logits, atol=1e-4, rtol=0)
    assert caches_in_parts[0].lengths.tolist() == caches[0].lengths.tolist()
    assert_caches(caches_in_parts, caches)


def of(model: Llama, config: mj.CompressionConfig | None = None, batch: int = 1, **options: Any) -> Any:
    return model.init_cache(config or CONFIGS["recommended"], batch=batch, capacity=64, **options)


def donated(model: Llama) -> Any:
    caches = of(model)
    caches[1].overflow.delete()
    return caches


def uneven(model: Llama) -> Any:
    first, second = of(model)
    return first, dataclasses.replace(second, lengths=second.lengths + 1)


def full(model: Llama) -> Any:
    return tuple(dataclasses.replace(cache, lengths=cache.lengths + 59) for cache in of(model))


OTHER = functools.partial(random_model, Llama)


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        (donated, r"caches\[1\] was donated to an earlier call"),
        (lambda m: of(m)[:1], "caches has 1 layers, the model 2"),
        (functools.partial(of, batch=2), r"caches\[0\]: batch=2, wanted 1"),
        (functools.partial(of, dtype=jnp.bfloat16), r"caches\[0\]: dtype='bfloat16', wanted 'float32'"),
        (functools.partial(of, config=DENSE), r"caches\[0\]: config has k_sparsity=0 instead of 0.7"),
        (lambda m: of(OTHER(dataclasses.replace(TINY, rope_theta=5e5))), "other RoPE frequencies"),
        (lambda m: of(OTHER(dataclasses.replace(TINY, num_kv_heads=4))), r"caches\[0\]: num_kv_heads=4, wanted 2"),
        (uneven, r"caches\[1\] holds \[1\] tokens, caches\[0\] \[0\]"),
        (full, r"sequence 0 holds 59 tokens; 3 of its prompt and max_new_tokens=3 exceed the capacity of 64"),
    ],
)
def test_caches_that_do_not_fit_are_named_before_any_work(llama, caches, message):
    given = caches(llama)
    progress = functools.partial(pytest.fail, "work was done")
    for run in (mj.generate, mj.stream):
        with pytest.raises(ValueError, match=message):
            run(llama, [[1, 2, 3]], max_new_tokens=3, caches=given, config=CONFIGS["recommended"], progress=progress)
    if caches is not donated:
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 5}, ValueError, "sequence 0 holds 0 tokens; 3 of its prompt and max_new_tokens=3 exceed"),
        ({"capacity": 513}, ValueError, "capacity=513 must lie in 1 .. 512, the model's context"),
        ({"capacity": "64"}, TypeError, "capacity='64' must be an integer"),
        ({"caches": ()}, TypeError, "caches is of type tuple; wanted those that a generation gave back"),
        ({"caches": "cache"}, TypeError, "caches is of type str"),
    ],
)
def test_other_arguments_that_do_not_fit_are_named(llama, options, error, message):
    with pytest.raises(error, match=message):
        mj.generate(llama, [[1, 2, 3]], max_new_tokens=3, **options)


def test_a_capacity_beside_caches_is_theirs(llama):
    with pytest.raises(ValueError, match="capacity=65, but the caches that are given have one of 64"):
        mj.generate(llama, [[1, 2, 3]], max_new_tokens=3, caches=of(llama), capacity=65)


def test_layers_that_cannot_extend_keep_no_caches():
    model = Overflowing(counting().table, Context(100, 100), (Flagging(5),))
    with pytest.raises(TypeError, match="the model's layers lack `extend`"):
        mj.generate(model, [[1, 2, 3]], max_new_tokens=3, capacity=50)
