"""Few programs for requests of many lengths: what is padded to what, that it leaves no mark, and what is kept."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax.cache import PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import keep_programs, loop, prefill, prefill_prompt, programs, scoring
from mustafar_jax.generation.programs import LastPrograms, padded
from tests.helpers import CONFIGS, exhaustive
from tests.mustafar_jax.generation.setting import LENGTHS, PROMPTS, TINY, VOCABULARY, Compilations, counting

NEW = 40
RULES = CompressionConfig(0.5, 0.5, k_method="output_aware", v_method="channel_output_aware")
COMPRESSED = CONFIGS | {"by queries": RULES}
NAMES = ["by queries", *exhaustive(*sorted(COMPRESSED.keys() - {"by queries"}))]
WRITTEN = ["dense", *exhaustive(*sorted(COMPRESSED.keys() - {"dense"}))]


def test_lengths_are_padded_to_powers_of_two_and_what_lies_between():
    lengths = range(1, 5000)
    found = [padded(length, 1 << 20) for length in lengths]
    assert sorted(set(found)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert found == sorted(found)
    assert all(length <= size for length, size in zip(lengths, found, strict=True))
    assert [padded(size, 1 << 20) for size in set(found)] == list(set(found))
    assert [padded(length, 700) for length in (5, 65, 600, 700)] == [64, 96, 700, 700]
    assert padded(5, 40) == 40


@pytest.mark.parametrize("name", WRITTEN)
def test_padding_leaves_no_mark_on_tokens(one_layer, name):
    config = COMPRESSED[name]
    options: dict[str, Any] = {"lengths": LENGTHS, "max_new_tokens": NEW, "config": config, "eos_id": 3}
    wanted = mj.generate(one_layer, PROMPTS, **options, padding=False)
    jax.tree.map(np.testing.assert_array_equal, mj.generate(one_layer, PROMPTS, **options), wanted)
    steps = np.stack(list(mj.stream(one_layer, PROMPTS, **options)), axis=1)
    np.testing.assert_array_equal(steps, wanted.tokens[:, : steps.shape[1]])


@pytest.mark.exhaustive
def test_padding_leaves_no_mark_on_draws_and_on_a_window(mistral):
    key = jax.random.key(2)
    options: dict[str, Any] = {"max_new_tokens": NEW, "config": CONFIGS["recommended"], "temperature": 1.2, "key": key}
    wanted = mj.generate(mistral, PROMPTS, **options, padding=False)
    jax.tree.map(np.testing.assert_array_equal, mj.generate(mistral, PROMPTS, **options), wanted)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_no_mark_on_what_a_prompt_tells(one_layer, name):
    """Means, weights and queries, entries that are kept, and the logits after it."""
    config = COMPRESSED[name]

    def filled(length: int, capacity: int) -> Any:
        caches = one_layer.init_cache(config, batch=4, capacity=capacity)
        tokens = jnp.asarray(np.pad(PROMPTS, ((0, 0), (0, length - PROMPTS.shape[1]))))
        return prefill_prompt(one_layer, tokens, jnp.asarray(LENGTHS, jnp.int32), caches)

    (logits, caches), (wanted, exact) = filled(96, 128), filled(70, 110)
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(logits, wanted, **close)
    for cache, other in zip(caches, exact, strict=True):
        for found, expected in zip(cache.to_dense()[:2], other.to_dense()[:2], strict=True):
            np.testing.assert_allclose(found[:, :110], expected, **close)
        if isinstance(cache, PackedCache):
            for name in ("key_mean", "query_norm", "queries"):
                jax.tree.map(
                    lambda x, y: np.testing.assert_allclose(x, y, **close), getattr(cache, name), getattr(other, name)
                )


@pytest.mark.exhaustive
def test_a_growing_chat_compiles_few_programs(one_layer):
    lengths, tokens = range(60, 140, 10), np.random.default_rng(0).integers(1, VOCABULARY, (1, 180))
    options: dict[str, Any] = {"max_new_tokens": 24, "config": CONFIGS["published"]}
    with Compilations() as compiled:
        for length in lengths:
            mj.generate(one_layer, tokens[:, :length], **options)
            next(mj.stream(one_layer, tokens[:, :length], **options))
    # Of 8 lengths: prompts of 64, 96, 128 and 192, caches of 96, 128 and 192.
    assert compiled.count("_decode_loop") == 3
    assert compiled.count("_prefill_rows") <= 6
    with Compilations() as compiled:
        mj.generate(one_layer, tokens[:, :133], **options)
    assert compiled == []


def test_padding_stays_within_the_context(one_layer):
    context = TINY.max_position_embeddings
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (1, context - 3))
    wanted = mj.generate(one_layer, tokens, max_new_tokens=3, padding=False)
    np.testing.assert_array_equal(mj.generate(one_layer, tokens, max_new_tokens=3).tokens, wanted.tokens)
    assert len(list(mj.stream(counting(20), [[1, 2]], max_new_tokens=18))) == 18


@pytest.mark.parametrize("padding", [None, 1, "no"])
def test_padding_is_a_flag(padding):
    with pytest.raises(TypeError, match=f"padding={padding!r} must be True or False"):
        mj.generate(counting(), [[1]], max_new_tokens=1, padding=padding)
    with pytest.raises(TypeError, match=f"padding={padding!r} must be True or False"):
        mj.log_likelihoods(counting(), [[1, 2]], prompt_length=1, padding=padding)


def test_the_programs_that_were_used_last_are_kept_and_others_freed():
    def double(x: jax.Array, *, times: int) -> jax.Array:
        return x * times

    function = LastPrograms(double, static_argnames="times")
    function.kept = 2
    shapes = [jnp.ones(size) for size in (3, 4, 5)]
    with Compilations() as compiled:
        assert function(shapes[0], times=2).tolist() == [2] * 3
        first = weakref.ref(function.of(shapes[0], times=2).__wrapped__)
        function(shapes[1], times=2)
        function(shapes[0], times=2)
        assert compiled.count("double") == 2
        function(shapes[2], times=2)  # in place of the second
        function(shapes[0], times=2)
        assert compiled.count("double") == 3
        assert function(shapes[1], times=3).tolist() == [3] * 4  # in place of the third
        assert function(shapes[2], times=2).tolist() == [2] * 5
        assert compiled.count("double") == 5
    gc.collect()
    assert first() is None


def test_the_number_that_is_kept_is_only_raised(monkeypatch):
    functions = [prefill._prefill_rows, loop._decode_loop, loop._stream_step, scoring._decode_given, scoring._extend]
    for function in programs._made:
        monkeypatch.setattr(function, "kept", programs.KEPT)
    keep_programs(programs.KEPT + 4)
    keep_programs(3)
    assert [function.kept for function in functions] == [programs.KEPT + 4] * 5


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_no_mark_on_likelihoods(one_layer, name):
    tokens, config = np.random.default_rng(1).integers(0, VOCABULARY, (2, 111)), COMPRESSED[name]
    options: dict[str, Any] = {"prompt_length": 70, "config": config}
    wanted = mj.log_likelihoods(one_layer, tokens, **options, padding=False)
    np.testing.assert_allclose(mj.log_likelihoods(one_layer, tokens, **options), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive
def test_what_pads_a_text_overflows_no_cache(one_layer):
    """Its 31 tokens that go into the cache fill no group; what pads them would, and so does one more."""
    config = CompressionConfig(0, 0.5, v_method="channel_magnitude", v_slots=4, residual_length=0)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 41))
    wanted = mj.log_likelihoods(one_layer, tokens[:, :32], prompt_length=20, config=config, padding=False)
    np.testing.assert_allclose(
        mj.log_likelihoods(one_layer, tokens[:, :32], prompt_length=20, config=config), wanted, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"v_slots=4 holds fewer entries than values of texts \[0, 1\] need"):
        mj.log_likelihoods(one_layer, tokens[:, :33], prompt_length=20, config=config)


@pytest.mark.exhaustive
def test_texts_of_many_lengths_compile_few_programs(one_layer):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 120))
    with Compilations() as compiled:
        for length in range(70, 120, 7):
            mj.log_likelihoods(one_layer, tokens[:, :length], prompt_length=length - 30)
    # Of 8 lengths: caches of 96 and 128, prompts of 64 and 96, what follows of 64.
    assert compiled.count("_decode_given") == 2
    assert compiled.count("_prefill_rows") == 2
