"""Any number of tokens on any cache: what they attend to, what the cache holds then, and where it is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mustafar_jax import CompressionConfig, LayerCache, append, attend, decode_attention, prefill, prefill_attention
from mustafar_jax.cache import PackedCache
from tests.helpers import CONFIGS, DTYPES, exhaustive, rms_error_ratio, rope_frequencies, to_dense
from tests.mustafar_jax.test_attention import poisoned
from tests.quick import HLO_AS_USERS

BATCH, KV_HEADS, HEADS, HEAD_DIM, CAPACITY, MOST = 3, 2, 4, 32, 224, 100
BY_QUERIES = {
    "output-aware": CompressionConfig(0.7, 0.5, k_method="output_aware", v_method="channel_output_aware"),
    "think": CompressionConfig(0.5, 0.5, k_method="think", v_method="think", sink_tokens=2, residual_length=40),
}
ALL = CONFIGS | BY_QUERIES
FAMILIES = ("dense", "recommended", "fast")
"""Of ALL, those that are tried in little time: plain rows, rows behind a bitmap, codes."""
HOW = {"dense": (40, 2.0), "recommended": (40, None), "fast": (None, 2.0)}
"""Sliding windows and caps that families are tried with; others without either."""
EVERY_FAMILY = pytest.mark.parametrize(
    "name", [*FAMILIES, *exhaustive(*(name for name in ALL if name not in FAMILIES))]
)

attend_jit = jax.jit(attend, static_argnames=("sliding_window", "logits_soft_cap", "return_lse"))
prefill_jit = jax.jit(prefill)


def empty(name, dtype=jnp.float32, **sizes):
    sizes = {"batch": BATCH, "capacity": CAPACITY, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM} | sizes
    heads = 2 * sizes["num_kv_heads"]
    return LayerCache.init(ALL[name], **sizes, dtype=dtype, num_heads=heads, inv_freq=rope_frequencies(HEAD_DIM))


def tokens(rng, count, dtype=jnp.float32, batch=BATCH):
    """Query, key and value of so many tokens; keys have a mean worth taking off."""
    means, heads = (0.0, 1.0, 0.0), (HEADS, KV_HEADS, KV_HEADS)
    shapes = zip(heads, means, strict=True)
    return [jnp.asarray(rng.standard_normal((batch, count, n, HEAD_DIM)) + m, dtype) for n, m in shapes]


@functools.partial(jax.jit, static_argnames=("window", "soft_cap"))
def reference(query, held, lengths, key, value, window=None, soft_cap=None):
    """Attention of n new tokens on what is held, as it is, followed by them; and the log-sum-exp of the scores."""
    keys, values = (
        jnp.concatenate([x.astype(jnp.float32), y], axis=1) for x, y in zip(held, (key, value), strict=True)
    )
    capacity, n = held[0].shape[1], query.shape[1]
    now = lengths[:, None] + jnp.arange(n)[None]
    then = jnp.concatenate([jnp.broadcast_to(jnp.arange(capacity)[None], (len(query), capacity)), now], axis=1)
    there = jnp.concatenate([jnp.arange(capacity)[None] < lengths[:, None], jnp.ones_like(now, bool)], axis=1)
    distance = now[..., None] - then[:, None]
    mask = there[:, None] & (distance >= 0) & (distance < (then.shape[1] if window is None else window))
    grouped = query.reshape(*query.shape[:2], KV_HEADS, -1, HEAD_DIM)
    with jax.default_matmul_precision("highest"):
        if soft_cap is None:
            out = jax.nn.dot_product_attention(query, keys, values, mask=mask[:, None])
        scores = jnp.einsum("bnkgh,bskh->bnkgs", grouped, keys) / HEAD_DIM**0.5
        scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(mask[:, :, None, None], scores, -jnp.inf)
        if soft_cap is not None:
            out = jnp.einsum("bnkgs,bskh->bnkgh", jax.nn.softmax(scores), values).reshape(query.shape)
    return out, jax.nn.logsumexp(scores, axis=-1).reshape(query.shape[:3])


@EVERY_FAMILY
@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**32 - 1),
    calls=st.lists(st.lists(st.integers(0, MOST), min_size=BATCH, max_size=BATCH), min_size=2, max_size=3),
)
def test_equals_dense_attention_on_what_is_held_and_given(name, seed, calls):
    """In calls of any lengths, of which those that would exceed the capacity are cut; slots without a token are NaN."""
    rng, cache = np.random.default_rng(seed), empty(name)
    window, soft_cap = HOW.get(name, (None, None))
    how = {"sliding_window": window, "logits_soft_cap": soft_cap, "return_lse": True}
    for lengths in calls:
        query, key, value = tokens(rng, MOST)
        *held, before = to_dense(cache)
        count = np.minimum(lengths, CAPACITY - np.asarray(before))
        expected = reference(query, held, before, key, value, window, soft_cap)
        there = np.arange(MOST)[None] < count[:, None]
        query, key, value = (jnp.where(there[..., None, None], x, jnp.nan) for x in (query, key, value))
        out, lse, cache = attend_jit(poisoned(cache), query, key, value, jnp.asarray(count), **how)
        for actual, wanted, nothing in zip((out, lse), expected, (0, -np.inf), strict=True):
            np.testing.assert_allclose(np.asarray(actual)[there], np.asarray(wanted)[there], atol=2e-5, rtol=2e-6)
            assert (np.asarray(actual)[~there] == nothing).all()
        np.testing.assert_array_equal(cache.lengths, np.asarray(before) + count)
        assert not cache.overflow.any()


@pytest.mark.parametrize(
    "name", [*(few := ("dense", "recommended")), *exhaustive(*(name for name in ALL if name not in few))]
)
def test_on_an_empty_cache_it_is_prefill(name):
    """The statistics and what is held bit for bit, whatever stood in the cache before."""
    rng, lengths = np.random.default_rng(0), jnp.array([MOST, 71, 3])
    query, key, value = tokens(rng, MOST)
    filled = prefill_jit(empty(name), key, value, lengths, query=query)
    before = prefill_jit(filled, value, key, jnp.zeros(BATCH, jnp.int32), query=query)
    for cache in (empty(name), before):
        out, cache = attend_jit(poisoned(cache), query, key, value, lengths)
        jax.tree.map(np.testing.assert_array_equal, to_dense(cache), to_dense(filled))
        expected = jax.jit(prefill_attention)(query, key, value, lengths)
        for row, length in enumerate(lengths.tolist()):
            np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=2e-6)
        if isinstance(cache, PackedCache):
            for field in ("key_mean", "query_norm"):
                jax.tree.map(np.testing.assert_array_equal, getattr(cache, field), getattr(filled, field))


@pytest.mark.parametrize("name", ["dense", *exhaustive("recommended", "output-aware", "small")])
def test_one_token_is_append_and_decode_attention(name):
    """Of the sequences that get one; bit for bit."""
    rng = np.random.default_rng(1)
    query, key, value = tokens(rng, 80)
    cache = prefill_jit(empty(name), key, value, jnp.array([80, 67, 5]), query=query)
    query, key, value = (x[:, :1] for x in (query, key, value))
    out, grown = attend_jit(cache, query, key, value)
    appended = jax.jit(append)(cache, key[:, 0], value[:, 0], query=query[:, 0])
    jax.tree.map(np.testing.assert_array_equal, grown, appended)
    np.testing.assert_array_equal(out[:, 0], jax.jit(decode_attention)(query[:, 0], appended))
    some, grown = attend_jit(cache, query, key, value, jnp.array([1, 0, 1]))
    assert grown.lengths.tolist() == [81, 67, 6]
    np.testing.assert_allclose(some, out.at[1].set(0), atol=1e-6)
    kept, before = to_dense(grown), to_dense(cache)
    np.testing.assert_array_equal(kept[0][1], before[0][1])


@pytest.mark.parametrize("name", ["recommended", *exhaustive("output-aware", "no window", "balanced")])
def test_tokens_that_fill_no_group_are_as_one_by_one(name):
    """Several tokens up to the one that fills a group, and this one alone: the same cache, whoever brought them."""
    rng = np.random.default_rng(2)
    query, key, value = tokens(rng, MOST)
    config = ALL[name]
    first = config.shortest_packed - 10
    caches = [prefill_jit(empty(name), key, value, jnp.full(BATCH, first), query=query) for _ in range(2)]
    query, key, value = tokens(rng, 10)
    outs, (several, one_by_one) = [], caches
    for part in (slice(0, 9), slice(9, 10)):
        out, several = attend_jit(several, *(x[:, part] for x in (query, key, value)))
        outs.append(out)
    for i in range(10):
        out, one_by_one = attend_jit(one_by_one, *(x[:, i : i + 1] for x in (query, key, value)))
        np.testing.assert_allclose(jnp.concatenate(outs, axis=1)[:, i], out[:, 0], atol=1e-5)
    assert several.packed_lengths.tolist() == [config.group] * BATCH
    for actual, expected in zip(to_dense(several), to_dense(one_by_one), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["recommended", *exhaustive("dense", "fast", "small")])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, *exhaustive(*(dtype for dtype in DTYPES if dtype != jnp.bfloat16))])
def test_every_dtype(name, dtype):
    rng = np.random.default_rng(3)
    cache = prefill_jit(empty(name, dtype), *tokens(rng, MOST, dtype)[1:], query=tokens(rng, MOST, dtype)[0])
    query, key, value = tokens(rng, 40, dtype)
    exact = [x.astype(jnp.float32) for x in (query, key, value)]
    *held, lengths = to_dense(cache)
    out, _ = attend_jit(cache, query, key, value)
    assert out.dtype == dtype
    expected, _ = reference(exact[0], held, lengths, *exact[1:])
    assert rms_error_ratio(out, expected) < {jnp.bfloat16: 5e-3, jnp.float16: 1e-3, jnp.float32: 1e-5}[dtype]


@pytest.mark.parametrize("name", ["dense", *exhaustive("recommended")])
def test_more_tokens_than_are_attended_at_a_time(name, monkeypatch):
    """Parts of queries and tiles of keys, the last of each moved back."""
    from mustafar_jax.backends.xla import tiles

    monkeypatch.setattr(tiles, "QUERIES", 32)
    monkeypatch.setattr(tiles, "TILE", 64)
    rng = np.random.default_rng(4)
    cache = prefill_jit(empty(name), *tokens(rng, MOST)[1:], query=tokens(rng, MOST)[0])
    query, key, value = tokens(rng, 75)
    *held, lengths = to_dense(cache)
    expected, _ = reference(query, held, lengths, key, value)
    out, _ = jax.jit(lambda *arguments: attend(*arguments))(cache, query, key, value)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["recommended", *exhaustive("dense", "small")])
def test_what_is_not_a_number_reaches_no_other_sequence(name):
    rng = np.random.default_rng(5)
    clean, broken = tokens(rng, MOST), tokens(rng, MOST)
    broken = [new.at[::2].set(old[::2]) for old, new in zip(clean, broken, strict=True)]
    broken[1] = broken[1].at[1, 50, 0, 3].set(jnp.nan)
    caches, outs = [], []
    for first in (clean, broken):
        _, cache = attend_jit(empty(name), *first)
        out, cache = attend_jit(cache, *clean)
        caches.append(to_dense(cache)[:2])
        outs.append(np.asarray(out))
    np.testing.assert_array_equal(outs[0][::2], outs[1][::2])
    assert np.isnan(outs[1][1, :, :2]).all()
    for one, other in zip(*caches, strict=True):
        np.testing.assert_array_equal(one[::2], other[::2])


@pytest.mark.parametrize("name", ["dense", "published"])
def test_what_has_no_room_is_not_written(name):
    """Under jit; outside, it is an error before any work."""
    cache = empty(name, batch=1, capacity=12, num_kv_heads=1)
    first, second = (jnp.arange(x, x + 8.0)[None, :, None, None] * jnp.ones((1, 8, 1, HEAD_DIM)) for x in (1, 9))
    _, cache = attend_jit(cache, *[first] * 3)
    _, full = attend_jit(cache, *[second] * 3)
    assert full.lengths.tolist() == [12]
    assert full.overflow.tolist() == [True]
    np.testing.assert_array_equal(to_dense(full)[0][0, :, 0, 0], np.arange(1, 13))
    with pytest.raises(ValueError, match=r"sequence 0 holds 8 tokens, and 5 more exceed the cache's capacity of 12"):
        attend(cache, *[second] * 3, [5])


def test_lengths_out_of_range_under_jit_count_as_the_nearest_and_are_flagged():
    parts = tokens(np.random.default_rng(6), 40)
    _, cache = attend_jit(empty("recommended"), *parts, jnp.array([50, -1, 40]))
    assert cache.lengths.tolist() == [40, 0, 40]
    assert cache.overflow.tolist() == [True, True, False]


def compiled(name, dtype, count):
    """A call of a layer at a capacity of 32,768, batch 4, compiled with the cache donated."""
    cache = jax.eval_shape(lambda: empty(name, dtype, batch=4, capacity=32768))
    shapes = [jax.ShapeDtypeStruct((4, count, heads, HEAD_DIM), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    step = jax.jit(lambda *arguments: attend(*arguments), donate_argnums=0, compiler_options=HLO_AS_USERS)
    return cache, step.lower(cache, *shapes, jax.ShapeDtypeStruct((4,), jnp.int32)).compile()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dense", jnp.bfloat16),
        *exhaustive(("recommended", jnp.bfloat16), ("fast", jnp.float32), ("dense", jnp.float32)),
        *exhaustive(("small", jnp.bfloat16), ("dense keys", jnp.float16)),
    ],
)
def test_the_compiled_call_works_in_place(name, dtype):
    """No copy of what is held, but for the ring, and no more memory than a tile takes."""
    cache, program = compiled(name, dtype, 8)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes <= 0.10 * cache.dense_nbytes
    leaves = [leaf for leaf in jax.tree.leaves(cache) if leaf.size > 4 * CAPACITY * KV_HEADS * HEAD_DIM]
    shapes = {",".join(map(str, leaf.shape)) for leaf in leaves}
    made = re.findall(r"= (\w+)\[([\d,]*)\]\S* (\w[\w-]*)\(", program.as_text())
    assert any(shape in shapes for _, shape, _ in made)  # the pattern does find the leaves
    assert [op for op in made if op[1] in shapes and op[2].startswith("copy")] == []


@pytest.mark.parametrize("name", ["dense", "published"])
@pytest.mark.parametrize("implementation", ["cudnn", "mosaic_gpu", ("mosaic_gpu", "xla"), "xla"])
def test_what_is_named_for_a_part_leaves_the_rest_to_others(name, implementation):
    """Several tokens: no kernel attends them to a cache yet, and none is refused for that."""
    parts = [jnp.zeros((BATCH, 8, heads, HEAD_DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    run = functools.partial(attend, implementation=implementation)
    out, cache = jax.eval_shape(run, jax.eval_shape(lambda: empty(name, jnp.bfloat16)), *parts)
    assert out.shape == parts[0].shape
    assert cache.batch == BATCH


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "cache is of type int; wanted a LayerCache", {"cache": 3}),
        (TypeError, "key has dtype bfloat16; the cache holds float32", {"key": jnp.ones((3, 8, 2, 32), jnp.bfloat16)}),
        (ValueError, r"key has shape \(3, 4, 2, 32\); the cache wants", {"key": jnp.ones((3, 4, 2, 32))}),
        (ValueError, r"value has shape \(3, 8, 1, 32\); the cache wants", {"value": jnp.ones((3, 8, 1, 32))}),
        (ValueError, r"query has shape \(2, 8, 4, 32\); the cache wants \[3, 8, N, 32\]", {"query": (2, 8, 4, 32)}),
        (ValueError, r"query has shape \(3, 4, 32\); wanted \[B, n, N, H\]", {"query": (3, 4, 32)}),
        (ValueError, r"query has shape \(3, 0, 4, 32\); wanted \[B, n, N, H\], n at", {"query": (3, 0, 4, 32)}),
        (ValueError, "query has 3 heads; wanted a multiple of the cache's 2", {"query": (3, 8, 3, 32)}),
        (ValueError, r"lengths=\[1, 9, 0\] must lie in 0 .. 8", {"lengths": [1, 9, 0]}),
        (ValueError, r"lengths is int.*\[2\]; wanted integers \[3\]", {"lengths": [1, 8]}),
        (ValueError, "logits_soft_cap=0 must be a positive number, or None", {"logits_soft_cap": 0}),
        (ValueError, "scale=nan must be a number, or None", {"scale": float("nan")}),
        (ValueError, "scale=True must be a number, or None", {"scale": True}),
        (ValueError, "scale=.*1j.* must be a number, or None", {"scale": np.complex64(1j)}),
        (ValueError, "scale='1' must be a number, or None", {"scale": "1"}),
        (ValueError, "sliding_window=0 must be an integer of at least 1", {"sliding_window": 0}),
        (ValueError, "implementation='pallas' must be one of", {"implementation": "pallas"}),
    ],
)
def test_bad_arguments(error, message, changed):
    if isinstance(changed.get("query"), tuple):
        changed = {"query": jnp.ones(changed["query"])}
    query, key = jnp.ones((BATCH, 8, HEADS, HEAD_DIM)), jnp.ones((BATCH, 8, KV_HEADS, HEAD_DIM))
    arguments = {"cache": empty("recommended"), "query": query, "key": key, "value": key} | changed
    with pytest.raises(error, match=message):
        attend(**arguments)


def test_numbers_may_be_of_any_kind_but_not_traced():
    query, key = jnp.ones((1, 2, 2, 32)), jnp.ones((1, 2, 1, 32))
    cache = LayerCache.init(CONFIGS["dense"], batch=1, capacity=8, num_kv_heads=1, head_dim=32, dtype=jnp.float32)

    def attended(lengths, **options):
        return attend(cache, query, key, key, lengths, **options)[0]

    wanted = attended([1], scale=0.5, logits_soft_cap=4)
    given = attended([1], scale=jnp.float32(0.5), logits_soft_cap=np.float32(4))
    np.testing.assert_array_equal(given, wanted)
    traced = jax.jit(lambda length: attended([length], scale=0.5, logits_soft_cap=4))
    np.testing.assert_allclose(traced(1), wanted, rtol=1e-6)
    for name in ("scale", "logits_soft_cap"):
        with pytest.raises(ValueError, match=rf"{name}=.* must be a .*number, or None; it is compiled in"):
            jax.jit(lambda x, name=name: attended([1], **{name: x}))(0.5)


@pytest.mark.parametrize("name", ["dense", *exhaustive("recommended", "fast")])
def test_stacked_caches_are_attended_under_vmap_and_scan(name):
    """As each of them is alone."""
    rng, lengths = np.random.default_rng(3), jnp.array([MOST, 80, 0])
    each = [tokens(rng, MOST) for _ in range(2)]
    caches = [attend_jit(empty(name), *one, lengths)[1] for one in each]
    stacked, (query, key, value) = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *x) for x in (caches, each))
    new = query[:, :, :1], key[:, :, :1], value[:, :, :1]
    expected = [attend_jit(cache, *(x[i] for x in new)) for i, cache in enumerate(caches)]
    by_vmap = jax.jit(jax.vmap(attend))(stacked, *new)
    by_scan = jax.jit(lambda *xs: jax.lax.scan(lambda _, x: (None, attend(*x)), None, xs)[1])(stacked, *new)
    for i, (out, cache) in enumerate(expected):
        for outs, grown in (by_vmap, by_scan):
            np.testing.assert_allclose(outs[i], out, atol=1e-5)
            one = jax.tree.map(lambda leaf, i=i: leaf[i], grown)
            for found, wanted in zip(to_dense(one), to_dense(cache), strict=True):
                np.testing.assert_allclose(found, wanted, atol=1e-5)
