"""What is written: by `generate`, step by step by `stream`, and where it stops."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mustafar_jax as mj
from mustafar_jax.generation import loop, prefill_prompt, sampling
from mustafar_jax.generation.text import Returned
from mustafar_jax.models import Llama
from tests.helpers import exhaustive
from tests.mustafar_jax.generation.setting import (
    CAPACITY,
    CONFIGS,
    LENGTHS,
    NEW,
    PROMPTS,
    VOCABULARY,
    Compilations,
    Context,
    Flagging,
    Lookup,
    Overflowing,
    always,
    compressed,
    counting,
    decode,
    stopped,
)


@nnx.jit
def forward(model: Llama, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """The logits after each row's last token, without a cache: [B, V]."""
    return jnp.take_along_axis(model(tokens, lengths), (lengths - 1)[:, None, None], axis=1)[:, 0]


def test_greedy_tokens_are_those_of_full_forward_passes(llama):
    result = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)
    assert result.tokens.shape == (4, NEW)
    assert result.tokens.dtype == result.lengths.dtype == jnp.int32
    assert result.lengths.tolist() == [NEW] * 4
    written = np.asarray(result.tokens)
    tokens, lengths, rows = np.pad(PROMPTS, ((0, 0), (0, NEW))), LENGTHS.copy(), np.arange(4)
    for step in range(NEW):
        token = np.argmax(forward(llama, tokens, jnp.asarray(lengths)), axis=-1)
        np.testing.assert_array_equal(written[:, step], token, err_msg=f"{step=}")
        tokens[rows, lengths] = token
        lengths += 1
    assert len(np.unique(tokens)) > 10  # no model that repeats itself at once


@pytest.mark.parametrize(
    ("name", "packed"), [("recommended", [32, 64, 64, 96]), *exhaustive(("published", [32, 64, 96, 128]))]
)
def test_compressed_tokens_are_those_of_a_loop_over_the_decode_step(one_layer, name, packed):
    config = CONFIGS[name]
    caches = one_layer.init_cache(config, batch=4, capacity=CAPACITY)
    logits, caches = prefill_prompt(one_layer, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS, jnp.int32), caches)
    packed_by_prefill = caches[0].packed_lengths
    wanted = []
    for _ in range(NEW):
        wanted.append(np.argmax(logits, axis=-1))
        logits, caches = decode(one_layer, jnp.asarray(wanted[-1], jnp.int32), caches)
    assert packed_by_prefill.tolist() == [0, 0, 0, 32]
    assert caches[0].packed_lengths.tolist() == packed

    result = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, config=config)
    np.testing.assert_array_equal(result.tokens, np.stack(wanted, axis=1))
    dense = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)
    assert (result.tokens != dense.tokens).any(axis=1).all()  # pruning leaves a mark on every row


@pytest.mark.exhaustive
@compressed
def test_a_ragged_batch_equals_its_prompts_one_by_one(one_layer, config):
    together = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, config=config)
    for row, length in enumerate(LENGTHS):
        # Padded to one shape, which compiles once for all rows.
        alone = mj.generate(one_layer, PROMPTS[row : row + 1], lengths=[length], max_new_tokens=NEW, config=config)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0], err_msg=f"{row=}")


@pytest.mark.exhaustive
def test_padding_leaves_no_mark(one_layer):
    config = CONFIGS["recommended"]
    padded = mj.generate(one_layer, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, config=config)
    alone = mj.generate(one_layer, PROMPTS[2:3, : LENGTHS[2]].tolist(), max_new_tokens=NEW, config=config)
    np.testing.assert_array_equal(padded.tokens[2], alone.tokens[0])


def test_the_stream_yields_the_tokens_of_generate(one_layer):
    options: dict[str, Any] = {"lengths": LENGTHS, "max_new_tokens": NEW, "config": CONFIGS["recommended"]}
    # A yielded array must stay what it is while its step's buffers are donated to the next.
    kept, seen = [], []
    for step in mj.stream(one_layer, PROMPTS, **options):
        assert step.shape == (4,)
        assert step.dtype == np.int32
        kept.append(step)
        seen.append(step.copy())
    result = mj.generate(one_layer, PROMPTS, **options)
    np.testing.assert_array_equal(np.stack(seen, axis=1), result.tokens)
    np.testing.assert_array_equal(np.stack(kept, axis=1), result.tokens)


@pytest.mark.parametrize("new", [1, 2, 16, 17, 18, 33, 40])
def test_tokens_are_the_same_wherever_the_loop_looks_for_stops(new):
    prompts = np.array([[3, 10], [4, 30]])
    wanted = np.array([[11], [31]]) + np.arange(new)
    for eos_id in (None, 27, 33):
        tokens, lengths = stopped(wanted, [eos_id])
        result = mj.generate(counting(), prompts, max_new_tokens=new, eos_id=eos_id)
        np.testing.assert_array_equal(result.tokens, tokens)
        assert result.lengths.tolist() == lengths


def test_the_loop_takes_a_known_number_of_steps_between_looks():
    never, ones = jnp.zeros(2, bool), jnp.ones(2, jnp.int32)
    state = loop.DecodeState(ones, never, ones, ~never, never, jnp.int32(1), ())
    stops = sampling.Stops(jnp.zeros(1, jnp.int32), jnp.int32(0), jnp.int32(40))
    arguments, how = (counting(), state, None, stops), {"implementation": None, "max_new_tokens": 40, "keep": False}
    compiled = loop._decode_loop.of(*arguments, **how).lower(*arguments, **how).compile()
    assert re.findall(r'"known_trip_count":{"n":"(\d+)"}', compiled.as_text()) == ["13"]  # 39 steps in three parts


@pytest.mark.parametrize("new", [1, 2, 3, 30])
def test_a_stream_has_as_many_steps_as_asked_for(new):
    steps = [step.tolist() for step in mj.stream(counting(), [[3, 10], [4, 30]], max_new_tokens=new)]
    assert steps == [[11 + i, 31 + i] for i in range(new)]


class Sampled(NamedTuple):
    generate: Any
    stream: Any
    result: mj.Generation


@pytest.fixture(scope="module")
def sampled(one_layer) -> Sampled:
    """One sampled generation, and the functions that repeat it with other arguments."""
    options: dict[str, Any] = {
        "lengths": LENGTHS,
        "max_new_tokens": NEW - 1,  # a shape that no other test compiles
        "padding": False,
        "config": CONFIGS["recommended"],
        "temperature": 1.5,
        "top_p": 0.9,
        "key": jax.random.key(3),
        "eos_id": VOCABULARY,  # never drawn
    }
    generate: Any = functools.partial(mj.generate, one_layer, **options)
    with Compilations() as compiled:
        result = generate(PROMPTS)
    assert compiled.count("_decode_loop") == 1
    assert compiled.count("_prefill_rows") == 1
    return Sampled(generate, functools.partial(mj.stream, one_layer, **options), result)


@pytest.mark.exhaustive
def test_a_sampled_stream_yields_the_tokens_of_generate_and_compiles_one_step(sampled):
    steps = sampled.stream(PROMPTS)
    tokens = [next(steps)]
    with Compilations() as compiled:
        tokens.append(next(steps))
    assert compiled.count("_stream_step") == 1
    with Compilations() as compiled:
        tokens.extend(steps)  # passes two or three groups' boundaries in each row
    assert compiled == []
    np.testing.assert_array_equal(np.stack(tokens, axis=1), sampled.result.tokens)


def test_other_lengths_temperatures_keys_and_stop_tokens_compile_nothing(sampled):
    options = {"temperature": 2.0, "top_p": 0.8, "key": jax.random.key(1), "eos_id": 2}
    with Compilations() as compiled:
        result = sampled.generate(PROMPTS, lengths=LENGTHS[::-1].copy(), **options)
    assert compiled == []
    assert (result.tokens != sampled.result.tokens).any()


def test_a_row_s_tokens_do_not_depend_on_the_other_rows(sampled):
    others, lengths = (PROMPTS + 7) % VOCABULARY, LENGTHS[::-1].copy()
    others[2], lengths[2] = PROMPTS[2], LENGTHS[2]
    changed = sampled.generate(others, lengths=lengths).tokens
    assert (changed != sampled.result.tokens).any(axis=1).tolist() == [True, True, False, True]


def test_a_row_that_has_stopped_leaves_the_others_as_they_are(sampled):
    endless = np.asarray(sampled.result.tokens)
    eos_id = endless[0, 4]
    tokens, lengths = stopped(endless, [eos_id])
    result = sampled.generate(PROMPTS, eos_id=eos_id)
    np.testing.assert_array_equal(result.tokens, tokens)
    assert result.lengths.tolist() == lengths
    assert min(lengths) <= 5 < 10 < max(lengths)


@pytest.mark.parametrize(
    ("eos_id", "wanted"),
    [
        (None, [20, 20, 20]),
        ([], [20, 20, 20]),
        (50, [20, 20, 11]),
        ([31], [20, 1, 20]),
        ((31, 12, 50), [2, 1, 11]),
        (np.array([12, 50, 55]), [2, 20, 11]),
    ],
    ids=str,
)
def test_rows_stop_at_their_first_stop_token_and_hold_0_after_it(eos_id, wanted):
    prompts = np.array([[3, 10], [4, 30], [39, 0]])
    lengths = np.array([2, 2, 1])
    endless = np.array([[11], [31], [40]]) + np.arange(20)
    tokens, counts = stopped(endless, [] if eos_id is None else eos_id)
    assert counts == wanted
    result = mj.generate(counting(), prompts, lengths=lengths, max_new_tokens=20, eos_id=eos_id)
    np.testing.assert_array_equal(result.tokens, tokens)
    assert result.lengths.tolist() == wanted
    steps = list(mj.stream(counting(), prompts, lengths=lengths, max_new_tokens=20, eos_id=eos_id))
    assert len(steps) == max(wanted)  # the stream ends with the last row
    np.testing.assert_array_equal(np.stack(steps, axis=1), tokens[:, : max(wanted)])


class Own(NamedTuple):
    vocab_size: int
    max_position_embeddings: int
    eos_ids: tuple[int, ...] | None


@pytest.mark.parametrize(
    ("own", "options", "wanted"),
    [
        ((8, 12), {}, 2),
        ((8, 12), {"eos_id": None}, 2),
        ((8, 12), {"eos_id": ()}, 20),
        ((8, 12), {"eos_id": []}, 20),
        ((8, 12), {"eos_id": 9}, 3),
        ((), {}, 20),
        (None, {}, 20),
    ],
)
def test_stop_tokens_are_the_model_s_own_unless_others_are_given(own, options, wanted):
    model = Lookup(counting().table, Own(100, 100, own))
    assert mj.generate(model, [[6]], max_new_tokens=20, **options).lengths.tolist() == [wanted]
    assert len(list(mj.stream(model, [[6]], max_new_tokens=20, **options))) == wanted


def test_a_stop_token_as_the_very_first_ends_everything():
    result = mj.generate(counting(), [[6]], max_new_tokens=10, eos_id=7)
    assert result.tokens.tolist() == [[7] + [0] * 9]
    assert result.lengths.tolist() == [1]
    assert [step.tolist() for step in mj.stream(counting(), [[6]], max_new_tokens=10, eos_id=7)] == [[7]]


def test_token_0_ends_a_row_only_as_a_stop_token():
    run = functools.partial(mj.generate, counting(8), [[5]], max_new_tokens=3)
    assert run().tokens.tolist() == [[6, 7, 0]]
    result = mj.generate(always([1.0, 0.0]), [[1]], max_new_tokens=5, eos_id=1)
    assert (result.tokens.tolist(), result.lengths.tolist()) == ([[0] * 5], [5])
    result = mj.generate(always([1.0, 0.0]), [[1]], max_new_tokens=5, eos_id=0)
    assert (result.tokens.tolist(), result.lengths.tolist()) == ([[0] * 5], [1])


@pytest.mark.parametrize("least", [1, 4, 5])
def test_no_stop_token_comes_among_the_first_ones(least):
    """After token 6 the model wants token 7, which stops; while it must not, token 5 is the next likeliest."""
    table = jnp.zeros((10, 10)).at[:, 7].set(2.0).at[:, 5].set(1.0)
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_id": (7, 9), "min_new_tokens": least}
    result = mj.generate(Lookup(table, Context(10, 100)), [[6]], **options)
    written = [5] * least + [7] * (least < 5)
    assert result.lengths.tolist() == [len(written)]
    assert result.tokens[0, : len(written)].tolist() == written
    steps = list(mj.stream(Lookup(table, Context(10, 100)), [[6]], **options))
    assert np.concatenate(steps).tolist() == written


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("tokens", "overflow"),
    [
        ((3,), [True, False]),  # of the first prompt
        ((10,), [True, False]),  # the padding of the other
        ((32,), [False, True]),  # written
        ((98, 64), [False, True]),  # the last one that is given to a cache, in the second layer
        ((65,), [False, False]),  # the last one written, which is not; the loop takes some steps more
        ((18,), [False, False]),  # what the first sequence stops with
        ((0,), [False, False]),  # what stands after it
    ],
)
def test_a_cache_that_overflows_is_told_of(tokens, overflow):
    model = Overflowing(counting().table, Context(100, 100), tuple(Flagging(token) for token in tokens))
    prompts, lengths = [[3, 10], [30, 10]], [2, 1]
    options: dict[str, Any] = {"lengths": lengths, "max_new_tokens": 35, "eos_id": 18}
    result = mj.generate(model, prompts, **options)
    assert result.tokens[1].tolist() == list(range(31, 66))
    assert result.overflow.tolist() == overflow
    steps = Returned(mj.stream(model, prompts, **options))
    assert len(list(steps)) == 35
    assert steps.value.overflow.tolist() == overflow


@pytest.mark.exhaustive
@compressed
def test_where_integers_have_64_bits_tokens_are_the_same(llama, config):
    expected = mj.generate(llama, PROMPTS[:2], max_new_tokens=40, config=config)
    with jax.enable_x64(True):
        result = mj.generate(llama, PROMPTS[:2], max_new_tokens=40, config=config)
    assert result.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(result.tokens, expected.tokens)


@pytest.mark.exhaustive
def test_progress_is_told_after_each_layer_in_order(llama):
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, progress=progress)
    assert calls == [(1, 2), (2, 2)]
    calls.clear()
    steps = mj.stream(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, progress=progress)
    next(steps)
    assert calls == [(1, 2), (2, 2)]
    calls.clear()
    texts = np.ones((4, CAPACITY), int)  # whose prompts are of the shape that is compiled
    mj.log_likelihoods(llama, texts, prompt_length=PROMPTS.shape[1], progress=progress)
    assert calls == [(1, 2), (2, 2)]
