import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import mustafar_jax as mj
from mustafar_jax import generation
from mustafar_jax.backends import registry
from mustafar_jax.backends.record import Operation
from mustafar_jax.cache import LayerCache, PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import decode_step, prefill_prompt
from mustafar_jax.models import Llama, Mistral, ModelConfig
from mustafar_jax.text import Returned
from tests.helpers import replace_backend

VOCABULARY = 61
TINY = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=32, max_position_embeddings=512,
)  # fmt: skip
CONFIGS = {
    "recommended": CompressionConfig.recommended(0.7, 0.7),
    "published": CompressionConfig(k_sparsity=0.7, v_sparsity=0.7),
}
# Prompts that are shorter than the dense window, end within it, and have a group to pack; the new tokens take each row
# past the boundaries of two or three groups, at steps of its own.
LENGTHS = np.array([1, 20, 41, 70])
NEW = 90
CAPACITY = 70 + NEW
PROMPTS = np.random.default_rng(0).integers(1, VOCABULARY, (4, LENGTHS.max()), dtype=np.int32)

compressed = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_model(model_class: type[Llama], config: ModelConfig) -> Llama:
    """A model with weights large enough for every part of it to matter to the logits."""
    graph, state = nnx.split(model_class(config, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda weight: weight * 8 if weight.ndim > 1 else weight, state))


@pytest.fixture(scope="module")
def llama() -> Llama:
    return random_model(Llama, TINY)


@pytest.fixture(scope="module")
def mistral() -> Llama:
    return random_model(Mistral, dataclasses.replace(TINY, sliding_window=48))


@nnx.jit
def forward(model: Llama, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """The logits after each row's last token, without a cache: [B, V]."""
    return jnp.take_along_axis(model(tokens, lengths), (lengths - 1)[:, None, None], axis=1)[:, 0]


decode = jax.jit(decode_step)


class Context(NamedTuple):
    vocab_size: int
    max_position_embeddings: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["config"])
@dataclasses.dataclass
class Lookup:
    """A model without layers: the logits after a token are its row of a table [V, V]."""

    table: jax.Array
    config: Any

    @property
    def layers(self) -> Sequence[generation.Layer]:
        return ()

    def embed(self, tokens):
        return self.table[tokens]

    def logits(self, hidden):
        return hidden

    def init_cache(self, config, *, batch, capacity):
        return ()


def always(logits: Sequence[float]) -> Lookup:
    """The same logits after every token."""
    table = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(logits), len(logits)))
    return Lookup(table, Context(len(logits), 1 << 20))


def counting(vocabulary: int = 100) -> Lookup:
    """After each token, the next one."""
    return Lookup(jnp.roll(jnp.eye(vocabulary), 1, axis=1), Context(vocabulary, vocabulary))


# What is written


def test_greedy_tokens_are_those_of_full_forward_passes(llama):
    result = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)
    assert result.tokens.shape == (4, NEW)
    assert result.tokens.dtype == result.lengths.dtype == jnp.int32
    assert result.lengths.tolist() == [NEW] * 4
    tokens, lengths, rows = np.pad(PROMPTS, ((0, 0), (0, NEW))), LENGTHS.copy(), np.arange(4)
    for step in range(NEW):
        token = np.argmax(forward(llama, tokens, jnp.asarray(lengths)), axis=-1)
        np.testing.assert_array_equal(result.tokens[:, step], token, err_msg=f"{step=}")
        tokens[rows, lengths] = token
        lengths += 1
    assert len(np.unique(result.tokens)) > 10  # no model that repeats itself at once


@pytest.mark.parametrize(("name", "packed"), [("recommended", [32, 64, 64, 96]), ("published", [32, 64, 96, 128])])
def test_compressed_tokens_are_those_of_a_loop_over_the_decode_step(llama, name, packed):
    config = CONFIGS[name]
    caches = llama.init_cache(config, batch=4, capacity=CAPACITY)
    logits, caches = prefill_prompt(llama, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS, jnp.int32), caches)
    packed_by_prefill = caches[0].packed_lengths
    wanted = []
    for _ in range(NEW):
        wanted.append(np.argmax(logits, axis=-1))
        logits, caches = decode(llama, jnp.asarray(wanted[-1], jnp.int32), caches)
    assert packed_by_prefill.tolist() == [0, 0, 0, 32]
    assert caches[0].packed_lengths.tolist() == packed

    result = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, config=config)
    np.testing.assert_array_equal(result.tokens, np.stack(wanted, axis=1))
    dense = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW)
    assert (result.tokens != dense.tokens).any(axis=1).all()  # pruning leaves a mark on every row


@compressed
def test_a_ragged_batch_equals_its_prompts_one_by_one(llama, config):
    together = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, config=config)
    for row, length in enumerate(LENGTHS):
        # Padded to one shape, which compiles once for all rows.
        alone = mj.generate(llama, PROMPTS[row : row + 1], lengths=[length], max_new_tokens=NEW, config=config)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0], err_msg=f"{row=}")


def test_padding_leaves_no_mark(llama):
    config = CONFIGS["recommended"]
    padded = mj.generate(llama, PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, config=config)
    alone = mj.generate(llama, PROMPTS[2:3, : LENGTHS[2]].tolist(), max_new_tokens=NEW, config=config)
    np.testing.assert_array_equal(padded.tokens[2], alone.tokens[0])


def test_the_stream_yields_the_tokens_of_generate(llama):
    options: dict[str, Any] = {"lengths": LENGTHS, "max_new_tokens": NEW, "config": CONFIGS["recommended"]}
    # A yielded array must stay what it is while its step's buffers are donated to the next.
    kept, seen = [], []
    for step in mj.stream(llama, PROMPTS, **options):
        assert step.shape == (4,)
        assert step.dtype == np.int32
        kept.append(step)
        seen.append(step.copy())
    result = mj.generate(llama, PROMPTS, **options)
    np.testing.assert_array_equal(np.stack(seen, axis=1), result.tokens)
    np.testing.assert_array_equal(np.stack(kept, axis=1), result.tokens)


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


@pytest.mark.parametrize("prompt_length", [1, 99])
def test_log_likelihoods_equal_a_full_forward_pass(llama, prompt_length):
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (2, 100))
    scores = mj.log_likelihoods(llama, tokens, prompt_length=prompt_length)
    logits = nnx.jit(lambda model, tokens: model(tokens))(llama, tokens)
    wanted = np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[:, :, 0]
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, wanted[:, prompt_length - 1 :], atol=1e-4, rtol=0)


def test_log_likelihoods_see_the_compressed_cache(llama):
    # The shapes of the loop over the decode step above, whose compiled functions serve here, too.
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (4, CAPACITY))
    config, start = CONFIGS["recommended"], PROMPTS.shape[1]
    scores = mj.log_likelihoods(llama, tokens, prompt_length=start, config=config)
    caches = llama.init_cache(config, batch=4, capacity=CAPACITY)
    logits, caches = prefill_prompt(llama, jnp.asarray(tokens[:, :start]), jnp.full(4, start, jnp.int32), caches)
    for step in range(start, CAPACITY):
        wanted = np.take_along_axis(jax.nn.log_softmax(logits), tokens[:, step, None], axis=-1)[:, 0]
        np.testing.assert_allclose(scores[:, step - start], wanted, atol=1e-4, rtol=0, err_msg=f"{step=}")
        logits, caches = decode(llama, jnp.asarray(tokens[:, step], jnp.int32), caches)
    assert caches[0].packed_lengths.tolist() == [96] * 4
    dense = mj.log_likelihoods(llama, tokens, prompt_length=start)
    assert np.abs(scores - dense).max() > 0.1


@pytest.mark.parametrize(
    ("batch", "length", "rows"),
    [(1, 10, 1), (1, 5000, 1), (4, 250, 4), (4, 251, 2), (7, 250, 4), (10, 300, 3), (5, 1001, 1), (9, 1, 9)],
)
def test_as_many_prompts_at_a_time_as_fit_in_even_parts(batch, length, rows, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 1000)
    assert generation._rows_at_a_time(batch, length) == rows


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
    never = jnp.zeros(2, bool)
    state = generation.DecodeState(jnp.zeros(2, jnp.int32), never, never, jnp.int32(1), ())
    stops = generation.Stops(jnp.zeros(1, jnp.int32), jnp.int32(0))
    loop = generation._decode_loop.lower(counting(), state, None, stops, None, 40).compile()
    assert re.findall(r'"known_trip_count":{"n":"(\d+)"}', loop.as_text()) == ["13"]  # 39 steps in three parts


@pytest.mark.parametrize("new", [1, 2, 3, 30])
def test_a_stream_has_as_many_steps_as_asked_for(new):
    steps = [step.tolist() for step in mj.stream(counting(), [[3, 10], [4, 30]], max_new_tokens=new)]
    assert steps == [[11 + i, 31 + i] for i in range(new)]


@pytest.mark.parametrize("name", ["dense", "recommended"])
def test_prompts_prefilled_some_at_a_time_equal_all_at_once(llama, name, monkeypatch):
    prompts, lengths = (jnp.asarray(np.concatenate([x, x[:1]]), jnp.int32) for x in (PROMPTS, LENGTHS))

    def run():
        calls: list[tuple[int, int]] = []
        caches = llama.init_cache(CONFIGS.get(name, generation.DENSE), batch=5, capacity=CAPACITY)
        return *prefill_prompt(llama, prompts, lengths, caches, progress=lambda *call: calls.append(call)), calls

    logits, caches, calls = run()
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 2 * PROMPTS.shape[1])  # three parts, the last of them moved back
    with Compilations() as compiled:
        in_parts, caches_in_parts, calls_in_parts = run()
    assert compiled.count("_prefill_layer") == 1
    assert (len(calls), calls_in_parts) == (2, [(i + 1, 6) for i in range(6)])
    np.testing.assert_allclose(in_parts, logits, atol=1e-4, rtol=0)
    for one, other in zip(caches_in_parts, caches, strict=True):
        for held, wanted in zip(one.to_dense(), other.to_dense(), strict=True):
            np.testing.assert_allclose(held, wanted, atol=1e-4, rtol=0)


# Sampling from a real model, and what compiles


class Compilations(logging.Handler):
    """Names of what is compiled while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if match := re.match(r"Finished XLA compilation of jit\((.*)\) in", record.getMessage()):
            self.names.append(match[1])

    def __enter__(self) -> list[str]:
        self.flag = jax.log_compiles()
        self.flag.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self.names

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("jax").removeHandler(self)
        self.flag.__exit__(*error)


class Sampled(NamedTuple):
    generate: Any
    stream: Any
    result: generation.Generation


@pytest.fixture(scope="module")
def sampled(llama) -> Sampled:
    """One sampled generation, and the functions that repeat it with other arguments."""
    options: dict[str, Any] = {
        "lengths": LENGTHS,
        "max_new_tokens": NEW - 1,  # a shape that no other test compiles
        "config": CONFIGS["recommended"],
        "temperature": 1.5,
        "top_p": 0.9,
        "key": jax.random.key(3),
        "eos_id": VOCABULARY,  # never drawn
    }
    generate: Any = functools.partial(mj.generate, llama, **options)
    with Compilations() as compiled:
        result = generate(PROMPTS)
    assert compiled.count("_decode_loop") == 1
    assert compiled.count("_prefill_layer") == 1
    return Sampled(generate, functools.partial(mj.stream, llama, **options), result)


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


# Sampling


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


nucleus = jax.jit(generation._nucleus)


@pytest.mark.parametrize(
    "options", [{"top_p": 1e-6}, {"temperature": 1e-3}, {"temperature": 1e-30}, {"temperature": 1e-44}]
)
def test_the_limits_of_both_options_are_the_likeliest_token(options):
    assert (draw(LOGITS * 50, "rows", **{"temperature": 1.0} | options) == 3).all()


# Stop tokens


def stopped(tokens, eos_ids):
    """What a generation that stops should give, of one that does not: tokens and lengths."""
    tokens, lengths = np.array(tokens), []
    for row in tokens:
        stops = np.flatnonzero(np.isin(row, eos_ids))
        lengths.append(stops[0] + 1 if len(stops) else len(row))
        row[lengths[-1] :] = 0
    return tokens, lengths


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


# What does not fit in a cache


@functools.partial(jax.tree_util.register_dataclass, data_fields=["overflow"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Flag:
    """A cache that holds nothing but its flags."""

    overflow: jax.Array

    @property
    def batch(self) -> int:
        return len(self.overflow)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flagging:
    """A layer whose cache overflows when it is given `token` (of `counting`'s one-hot rows)."""

    token: int

    def prefill(self, hidden, cache, lengths, *, implementation=None):
        held = jnp.arange(hidden.shape[1]) < lengths[:, None]
        return hidden, Flag((held & (hidden[..., self.token + 1] > 0)).any(axis=1))

    def decode(self, hidden, cache, *, implementation=None):
        return hidden, Flag(cache.overflow | (hidden[:, self.token + 1] > 0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["config", "flags"])
@dataclasses.dataclass
class Overflowing(Lookup):
    """Counts, and some of its layers' caches overflow at a token each."""

    flags: tuple[generation.Layer, ...]

    @property
    def layers(self):
        return self.flags

    def init_cache(self, config, *, batch, capacity):
        return tuple(Flag(jnp.zeros(batch, bool)) for _ in self.flags)


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
    assert steps.value.tolist() == overflow


def test_log_likelihoods_raise_where_a_cache_overflows():
    model = Overflowing(counting().table, Context(100, 100), (Flagging(40), Flagging(7)))
    texts = [[3, 10, 4], [3, 7, 4], [3, 10, 7]]  # the last token is given to no cache
    with pytest.raises(ValueError, match=r"v_slots=None holds fewer entries than values of texts \[1\] need"):
        mj.log_likelihoods(model, texts, prompt_length=1)


@pytest.mark.parametrize("run", [mj.generate, mj.stream, mj.log_likelihoods])
@pytest.mark.parametrize(("config", "implementation"), [(None, "triton"), (CONFIGS["published"], "cudnn")])
def test_who_cannot_attend_is_refused_before_any_work(llama, run, config, implementation):
    length = {"prompt_length": 1} if run is mj.log_likelihoods else {"max_new_tokens": 3}
    progress = functools.partial(pytest.fail, "work was done")
    with pytest.raises(NotImplementedError, match=f"implementation='{implementation}' .*attend"):
        run(llama, [[3, 10, 4]], **length, config=config, implementation=implementation, progress=progress)


@compressed
def test_where_integers_have_64_bits_tokens_are_the_same(llama, config):
    expected = mj.generate(llama, PROMPTS[:2], max_new_tokens=40, config=config)
    with jax.enable_x64(True):
        result = mj.generate(llama, PROMPTS[:2], max_new_tokens=40, config=config)
    assert result.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(result.tokens, expected.tokens)


# Who packs


@jax.tree_util.register_static
class Asked:
    """A layer that notes whom it is told to attend and pack by: a list for each of its methods."""

    def __init__(self) -> None:
        self.prefills: list[Any] = []
        self.decodes: list[Any] = []

    def prefill(self, hidden, cache, lengths, *, implementation=None):
        self.prefills.append(implementation)
        return hidden, cache

    def decode(self, hidden, cache, *, implementation=None):
        self.decodes.append(implementation)
        return hidden, cache


@pytest.mark.parametrize("run", [mj.generate, mj.stream, mj.log_likelihoods])
def test_the_implementation_reaches_every_layer(run):
    layers = Asked(), Asked()
    model = Overflowing(counting().table, Context(100, 100), layers)
    length = {"prompt_length": 1} if run is mj.log_likelihoods else {"max_new_tokens": 3}
    result = run(model, [[3, 10, 4]], **length, implementation=["triton", "xla"])
    if run is mj.stream:
        assert len(list(result)) == 3
    asked = layers[0].decodes.pop(0)  # before any work, whether it can
    for layer in layers:
        assert layer.prefills == layer.decodes == [asked] == [("triton", "xla")]


@pytest.mark.parametrize(
    ("implementation", "wanted"), [("xla", "xla"), ("triton", "triton"), (("cudnn", "xla"), "xla"), ("cudnn", "triton")]
)
def test_a_layer_packs_by_whom_it_is_told(llama, monkeypatch, implementation, wanted):
    packed_by: list[str] = []

    def pack(name, packing):
        packed_by.append(name)
        return packing.key.target, packing.value.target

    attends = Operation(lambda operands: operands.query)
    for name in ("triton", "xla", "cudnn"):  # as on a GPU: Triton is the best that packs
        packs = None if name == "cudnn" else Operation(functools.partial(pack, name))
        replace_backend(monkeypatch, name, needs_cuda=False, attend_packed=attends, pack=packs)
    (held, _), layer = (
        llama.init_cache(CompressionConfig(), batch=3, capacity=77),
        llama.layers[0],
    )  # a shape of its own
    hidden, lengths = jnp.zeros((3, 70, TINY.hidden_size)), jnp.full(3, 70)
    jax.eval_shape(functools.partial(layer.prefill, implementation=implementation), hidden, held, lengths)
    assert packed_by == [wanted]
    jax.eval_shape(functools.partial(layer.decode, implementation=implementation), hidden[:, 0], held)
    assert packed_by == [wanted] * 2


@pytest.mark.parametrize(
    ("implementation", "wanted"),
    [
        (None, None),
        ("xla", "xla"),
        ("triton", "triton"),
        ("cudnn", None),
        ("mosaic_gpu", None),
        (["mosaic_gpu", "triton", "xla"], ("triton", "xla")),
        (("cudnn", "mosaic_gpu"), None),
    ],
)
def test_who_packs_beside_who_attends(implementation, wanted):
    assert registry.packers(implementation) == wanted


# Progress


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
    mj.log_likelihoods(llama, np.ones((2, 100), int), prompt_length=99, progress=progress)
    assert calls == [(1, 2), (2, 2)]


# Errors


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Untouched:
    """A model that must not be run: `embed` is where all work begins."""

    head_dim: int = 32

    @property
    def config(self) -> Context:
        return Context(vocab_size=10, max_position_embeddings=64)

    @property
    def layers(self) -> Sequence[generation.Layer]:
        return ()

    def embed(self, tokens):
        raise AssertionError("the model was run")

    def logits(self, hidden):
        raise AssertionError("the model was run")

    def init_cache(self, config, *, batch, capacity):
        sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": 1, "head_dim": self.head_dim}
        return (LayerCache.init(config, **sizes, dtype=jnp.float32, inv_freq=np.ones(self.head_dim // 2)),)


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "rank 1": ([1, 2], r"tokens is int64\[2\]; wanted integers \[B, S\]"),
    "rank 3": (np.ones((1, 1, 1), np.int32), r"tokens is int32\[1, 1, 1\]; wanted integers \[B, S\]"),
    "floats": ([[1.0, 2.0]], r"tokens is float64\[1, 2\]; wanted integers \[B, S\]"),
    "several lengths": ([[1, 2], [3]], r"tokens has rows of several lengths; wanted \[B, S\]: pad them"),
    "a tokenizer's answer": ({"input_ids": [[1]]}, r"tokens is a dict; wanted integers \[B, S\], such as its"),
    "no token": (np.ones((2, 0), int), r"tokens has shape \(2, 0\): an empty prompt; wanted at least one token"),
    "no sequence": (np.ones((0, 2), int), r"tokens has shape \(0, 2\): an empty prompt; wanted at least one token"),
    "above the vocabulary": ([[1, 10]], r"tokens holds 1 \.\. 10; the vocabulary is 0 \.\. 9"),
    "negative": ([[-1, 9]], r"tokens holds -1 \.\. 9; the vocabulary is 0 \.\. 9"),
}
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no new token": ({"max_new_tokens": 0}, r"max_new_tokens=0 must be an integer of at least 1"),
    "past the context": ({"max_new_tokens": 62}, r"3 tokens of prompt and max_new_tokens=62 exceed .* context of 64"),
    "empty prompt": ({"lengths": [3, 0]}, r"lengths=\[3, 0\] must lie in 1 \.\. 3"),
    "length above the prompt": ({"lengths": [4, 3]}, r"lengths=\[4, 3\] must lie in 1 \.\. 3"),
    "one length": ({"lengths": [3]}, r"lengths is int\d\d\[1\]; wanted integers \[2\]"),
    "broken length": ({"lengths": [2.5, 3.0]}, r"lengths is float\d\d\[2\]; wanted integers \[2\]"),
    "negative temperature": ({"temperature": -0.5}, r"temperature=-0.5 must be finite and at least 0"),
    "nan temperature": ({"temperature": float("nan")}, r"temperature=nan must be finite and at least 0"),
    "infinite temperature": ({"temperature": float("inf")}, r"temperature=inf must be finite"),
    "top_p of 0": ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    "top_p above 1": ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    "top_p of nan": ({"top_p": float("nan")}, r"top_p=nan must lie in \(0, 1\]"),
    "no key": ({"temperature": 1.0}, r"key=None: temperature=1.0 .* needs a jax.random.key"),
    "a seed": ({"temperature": 1.0, "key": 7}, r"key is 7; wanted one jax.random.key"),
    "two keys": (
        {"temperature": 1.0, "key": jax.random.split(jax.random.key(0))},
        r"key is key<.*>\[2\]; wanted one jax.random.key",
    ),
    "broken stop token": ({"eos_id": 2.5}, r"eos_id=2.5 .*integer"),
    "broken stop tokens": ({"eos_id": [2, 2.5]}, r"eos_id=\[2, 2.5\] .*integer"),
    "negative minimum": ({"min_new_tokens": -1}, r"min_new_tokens=-1 must be an integer in 0 \.\. max_new_tokens=2"),
    "minimum above the most": ({"min_new_tokens": 3}, r"min_new_tokens=3 must be an integer in 0 \.\. .*=2"),
    "broken minimum": ({"min_new_tokens": 1.5}, r"min_new_tokens=1.5 must be an integer"),
    "unknown implementation": ({"implementation": "cuda"}, r"implementation='cuda' must be one of .*'xla'"),
    "no implementation": ({"implementation": ()}, r"implementation=\(\) .*wanted at least one"),
}


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens_are_refused_before_any_work(run, case):
    tokens, message = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=message):
        run(Untouched(), tokens, max_new_tokens=2)


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_before_any_work(run, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        run(Untouched(), np.ones((2, 3), np.int32), **{"max_new_tokens": 2} | options)


@pytest.mark.parametrize("run", [mj.generate, mj.stream])
def test_a_head_dim_that_cannot_be_packed_is_refused_before_any_work(run):
    model, tokens = Untouched(head_dim=48), np.ones((2, 3), np.int32)
    with pytest.raises(ValueError, match="head_dim=48 must be a multiple of 32 where keys or values are pruned"):
        run(model, tokens, max_new_tokens=2, config=CompressionConfig())


def test_the_context_is_used_to_its_last_token():
    with pytest.raises(AssertionError, match="the model was run"):
        mj.generate(Untouched(), np.ones((2, 3), np.int32), max_new_tokens=61)
    with pytest.raises(AssertionError, match="the model was run"):
        mj.log_likelihoods(Untouched(), np.ones((2, 64), np.int32), prompt_length=63)


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_texts_are_refused_before_any_work(case):
    tokens, message = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=message):
        mj.log_likelihoods(Untouched(), tokens, prompt_length=1)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (5, {"prompt_length": 0}, r"prompt_length=0 must lie in 1 \.\. 4"),
        (5, {"prompt_length": 5}, r"prompt_length=5 must lie in 1 \.\. 4"),
        (1, {"prompt_length": 1}, r"tokens has shape \(2, 1\).* at least two tokens"),
        (65, {"prompt_length": 5}, r"tokens .* 65 .* context of 64"),
        (5, {"prompt_length": 1, "implementation": "cuda"}, r"implementation='cuda' must be one of .*'xla'"),
    ],
)
def test_bad_scoring_is_refused_before_any_work(length, options, message):
    with pytest.raises(ValueError, match=message):
        mj.log_likelihoods(Untouched(), np.ones((2, length), np.int32), **options)


def test_scoring_with_a_head_dim_that_cannot_be_packed_is_refused_before_any_work():
    with pytest.raises(ValueError, match="head_dim=48 must be a multiple of 32"):
        mj.log_likelihoods(Untouched(48), np.ones((1, 5), np.int32), prompt_length=2, config=CompressionConfig())
