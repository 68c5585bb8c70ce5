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
from mustafar_jax.generation import keep_programs, loop, prefill, prefill_prompt, programs
from mustafar_jax.generation.programs import LastPrograms, padded
from tests.helpers import CONFIGS, exhaustive
from tests.mustafar_jax.generation.setting import LENGTHS, PROMPTS, TINY, VOCABULARY, Compilations, counting

NEW = 40
RULES = CompressionConfig(0.5, 0.5, k_method="output_aware", v_method="channel_output_aware")
COMPRESSED = CONFIGS | {"by queries": RULES}
NAMES = ["recommended", "by queries", *exhaustive(*sorted(COMPRESSED.keys() - {"recommended", "by queries"}))]


def test_lengths_are_padded_to_powers_of_two_and_what_lies_between():
    lengths = range(1, 5000)
    found = [padded(length, 1 << 20) for length in lengths]
    assert sorted(set(found)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert found == sorted(found)
    assert all(length <= size for length, size in zip(lengths, found, strict=True))
    assert [padded(size, 1 << 20) for size in set(found)] == list(set(found))
    assert [padded(length, 700) for length in (5, 65, 600, 700)] == [64, 96, 700, 700]
    assert padded(5, 40) == 40


@pytest.mark.parametrize("name", NAMES)
def test_padding_leaves_no_mark_on_tokens(llama, name):
    config = COMPRESSED[name]
    options: dict[str, Any] = {"lengths": LENGTHS, "max_new_tokens": NEW, "config": config, "eos_id": 3}
    wanted = mj.generate(llama, PROMPTS, **options, padding=False)
    jax.tree.map(np.testing.assert_array_equal, mj.generate(llama, PROMPTS, **options), wanted)
    steps = np.stack(list(mj.stream(llama, PROMPTS, **options)), axis=1)
    np.testing.assert_array_equal(steps, wanted.tokens[:, : steps.shape[1]])


def test_padding_leaves_no_mark_on_draws_and_on_a_window(mistral):
    key = jax.random.key(2)
    options: dict[str, Any] = {"max_new_tokens": NEW, "config": CONFIGS["recommended"], "temperature": 1.2, "key": key}
    wanted = mj.generate(mistral, PROMPTS, **options, padding=False)
    jax.tree.map(np.testing.assert_array_equal, mj.generate(mistral, PROMPTS, **options), wanted)


@pytest.mark.parametrize("config", COMPRESSED.values(), ids=COMPRESSED)
def test_padding_leaves_no_mark_on_what_a_prompt_tells(llama, config):
    """Means, weights and queries, entries that are kept, and the logits after it."""

    def filled(length: int, capacity: int) -> Any:
        caches = llama.init_cache(config, batch=4, capacity=capacity)
        tokens = jnp.asarray(np.pad(PROMPTS, ((0, 0), (0, length - PROMPTS.shape[1]))))
        return prefill_prompt(llama, tokens, jnp.asarray(LENGTHS, jnp.int32), caches)

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


def test_a_growing_chat_compiles_few_programs(llama):
    lengths, tokens = range(60, 360, 25), np.random.default_rng(0).integers(1, VOCABULARY, (1, 360))
    options: dict[str, Any] = {"max_new_tokens": 24, "config": CONFIGS["published"]}
    with Compilations() as compiled:
        for length in lengths:
            mj.generate(llama, tokens[:, :length], **options)
            next(mj.stream(llama, tokens[:, :length], **options))
    # Of 12 lengths: prompts of 64, 96, 128, 192, 256 and 384, caches of 96, 128, 192, 256 and 384.
    assert compiled.count("_decode_loop") == 5
    assert compiled.count("_prefill_rows") <= 8
    with Compilations() as compiled:
        mj.generate(llama, tokens[:, :333], **options)
    assert compiled == []


def test_padding_stays_within_the_context(llama):
    context = TINY.max_position_embeddings
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (1, context - 3))
    wanted = mj.generate(llama, tokens, max_new_tokens=3, padding=False)
    np.testing.assert_array_equal(mj.generate(llama, tokens, max_new_tokens=3).tokens, wanted.tokens)
    assert len(list(mj.stream(counting(20), [[1, 2]], max_new_tokens=18))) == 18


@pytest.mark.parametrize("padding", [None, 1, "no"])
def test_padding_is_a_flag(padding):
    with pytest.raises(TypeError, match=f"padding={padding!r} must be True or False"):
        mj.generate(counting(), [[1]], max_new_tokens=1, padding=padding)


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
    functions = [prefill._prefill_rows, loop._decode_loop, loop._stream_step]
    for function in functions:
        monkeypatch.setattr(function, "kept", programs.KEPT)
    keep_programs(programs.KEPT + 4)
    keep_programs(3)
    assert [function.kept for function in functions] == [programs.KEPT + 4] * 3
