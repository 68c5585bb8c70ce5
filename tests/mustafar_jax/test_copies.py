"""Caches repeated and cut: as if each sequence had been there so often, as if the later tokens had never come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mustafar_jax import repeat, truncate
from mustafar_jax.cache.copies import shortest_length
from tests.helpers import exhaustive, to_dense
from tests.mustafar_jax.test_attention import poisoned
from tests.mustafar_jax.test_blocks import ALL, BATCH, MOST, attend_jit, empty, prefill_jit, tokens

SOME = pytest.mark.parametrize(
    "name",
    [*(few := ("dense", "recommended")), *exhaustive(*(name for name in ALL if name not in few))],
)


def filled(name, lengths, seed=0, **sizes):
    query, key, value = tokens(np.random.default_rng(seed), MOST)
    return prefill_jit(empty(name, **sizes), key, value, jnp.asarray(lengths), query=query)


@SOME
def test_a_repeated_sequence_stands_side_by_side(name):
    cache = filled(name, [100, 70, 5])
    first, second = repeat((cache, cache), 2)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert (first.batch, first.nbytes) == (2 * BATCH, 2 * cache.nbytes)
    for copies, one in zip(jax.tree.leaves(first), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(copies[0::2], one)
        np.testing.assert_array_equal(copies[1::2], one)


@pytest.mark.exhaustive
@SOME
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), back=st.lists(st.integers(0, 40), min_size=BATCH, max_size=BATCH))
def test_a_cut_cache_goes_on_as_if_the_later_tokens_had_never_come(name, seed, back):
    """Where nothing of them was packed; what they wrote elsewhere has no effect, nor has what no token wrote."""
    query, key, value = tokens(np.random.default_rng(seed), MOST)
    config, lengths = ALL[name], np.array([96, 71, 30])
    least = [0 if config.is_dense else shortest_length(config, length) for length in lengths.tolist()]
    kept = np.maximum(lengths - np.array(back), least)
    cache = attend_jit(empty(name), query, key, value, jnp.asarray(lengths))[1]
    cut = truncate(cache, kept)
    _, more_key, more_value = tokens(np.random.default_rng(seed + 1), MOST)
    outs = []
    for one in (cut, poisoned(cut)):
        out, grown = attend_jit(one, query, more_key, more_value, jnp.full(BATCH, MOST))
        outs.append((out, *to_dense(grown)))
    jax.tree.map(np.testing.assert_array_equal, *outs)
    there = (np.arange(cut.capacity)[None] < kept[:, None])[..., None, None]
    for now, before in zip(to_dense(cut)[:2], to_dense(cache)[:2], strict=True):
        np.testing.assert_array_equal(now, np.where(there, before, 0))
    if getattr(cut, "key_mean", None) is not None:  # of a sequence that packs nothing yet, it is of what stays
        fresh = attend_jit(empty(name), query, key, value, jnp.asarray(kept))[1]
        for row in np.flatnonzero(np.asarray(cut.packed_lengths) == 0):
            np.testing.assert_allclose(cut.key_mean[row], fresh.key_mean[row], atol=2e-6)


@pytest.mark.parametrize("name", ["recommended", *exhaustive("dense", "output-aware", "fast")])
def test_a_sequence_cut_to_nothing_is_as_an_empty_one(name):
    """Or to its sinks: statistics are then those of what comes."""
    query, key, value = tokens(np.random.default_rng(7), MOST)
    cache = truncate(filled(name, [100, 90, 20], seed=8), [0, 0, 0])
    jax.tree.map(
        np.testing.assert_array_equal,
        to_dense(attend_jit(cache, query, key, value, jnp.full(BATCH, MOST))[1]),
        to_dense(attend_jit(empty(name), query, key, value, jnp.full(BATCH, MOST))[1]),
    )


@pytest.mark.exhaustive
def test_recent_queries_that_are_cut_are_not_scored_with():
    """A sequence whose queries are all still there is as if the later tokens had never come."""
    query, key, value = tokens(np.random.default_rng(9), MOST)
    whole, part = jnp.array([32, 30, 9]), jnp.array([20, 30, 3])
    cut = truncate(attend_jit(empty("output-aware"), query, key, value, whole)[1], part)
    fresh = attend_jit(empty("output-aware"), query, key, value, part)[1]
    np.testing.assert_array_equal(cut.queries, fresh.queries)
    later = tokens(np.random.default_rng(10), MOST)
    grown = [to_dense(attend_jit(cache, *later, jnp.full(BATCH, MOST))[1]) for cache in (cut, fresh)]
    jax.tree.map(np.testing.assert_array_equal, *grown)


def test_what_is_packed_cannot_be_unpacked():
    caches = [filled("recommended", [100, 70, 5]), filled("recommended", [100, 70, 5])]
    with pytest.raises(ValueError, match=r"lengths\[0\]=99 .*sequence 0 holds 100 tokens.*go back to 100, or to 4 and"):
        truncate(caches, [99, 70, 5])
    with pytest.raises(ValueError, match=r"lengths\[1\]=60 is too short: .*it can go back to 68, or to 4 and fewer"):
        truncate(caches, [100, 60, 5])
    with pytest.raises(ValueError, match=r"lengths\[2\]=6 must lie in 0 .. 5, the tokens that sequence 2 holds"):
        truncate(caches, [100, 70, 6])
    assert [cache.lengths.tolist() for cache in truncate(caches, [100, 68, 1])] == [[100, 68, 1]] * 2


@pytest.mark.parametrize(
    ("error", "message", "caches", "lengths"),
    [
        (ValueError, r"lengths is int64\[2\]; wanted integers \[3\]", None, [1, 2]),
        (ValueError, r"lengths is float64\[3\]; wanted integers \[B\]", None, [1.0, 2, 3]),
        (TypeError, "cache is of type int; wanted a LayerCache", [3], [1]),
        (TypeError, r"caches is \[\]; wanted at least one LayerCache", [], [1]),
    ],
)
def test_bad_arguments(error, message, caches, lengths):
    with pytest.raises(error, match=message):
        truncate(empty("dense") if caches is None else caches, lengths)


def test_under_jit_nothing_is_cut():
    with pytest.raises(TypeError, match="truncate takes no traced caches or lengths"):
        jax.jit(truncate)(empty("dense"), jnp.zeros(BATCH, jnp.int32))


def test_repeat_refuses_what_is_no_count():
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        repeat(empty("dense"), 0)
    with pytest.raises(TypeError, match=r"n=1.5 must be an integer"):
        repeat(empty("dense"), 1.5)


def test_caches_that_were_cut_can_be_donated_one_after_the_other():
    cut = truncate((filled("dense", [40, 20, 5]), filled("recommended", [40, 20, 5])), [39, 20, 5])
    for cache in cut:
        jax.jit(lambda cache: cache, donate_argnums=0)(cache)
    assert all(leaf.is_deleted() for cache in cut for leaf in (cache.lengths, cache.overflow))
