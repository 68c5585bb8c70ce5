"""Attention on caches: equal to dense attention on what the cache holds, whatever the lengths; prefill; arguments."""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mustafar_jax import (
    CompressionConfig,
    LayerCache,
    append,
    decode_attention,
    key_spmv,
    pack,
    prefill,
    prefill_attention,
)
from mustafar_jax.attention import decode_operands
from mustafar_jax.backend import Operation
from mustafar_jax.backends import registry
from mustafar_jax.cache import PackedCache, Store
from tests.helpers import (
    CONFIGS,
    DTYPES,
    attention_on_dense,
    exhaustive,
    replace_backend,
    rms_error_ratio,
    rope_frequencies,
    to_dense,
)

BATCH, KV_HEADS, HEAD_DIM, CAPACITY, PROMPT = 3, 2, 64, 448, 300
TOLERANCE = {jnp.bfloat16: 5e-3, jnp.float16: 1e-3, jnp.float32: 1e-5}

prefill_jit = jax.jit(prefill)
append_jit = jax.jit(append)
attend = jax.jit(decode_attention, static_argnames=("scale", "sliding_window", "implementation"))


def assert_close(actual, expected):
    """Equal within float32's rounding of the largest number."""
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(1, float(jnp.abs(expected).max())))


def empty(config, dtype=jnp.float32, **sizes):
    sizes = {"batch": BATCH, "capacity": CAPACITY, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM} | sizes
    return LayerCache.init(config, **sizes, dtype=dtype, inv_freq=rope_frequencies(sizes["head_dim"]))


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def filled(config, lengths, rng, dtype=jnp.float32, **sizes):
    """A cache with a prompt in it; keys have a mean worth taking off, channels have scales of their own."""
    cache = empty(config, dtype, **sizes)
    shape = (cache.batch, PROMPT, cache.num_kv_heads, cache.head_dim)
    scales = np.exp(rng.standard_normal(cache.head_dim))
    key, value = (jnp.asarray(rng.standard_normal(shape) * scales + mean, dtype) for mean in (2.0, 0.0))
    query = normal(rng, cache.batch, PROMPT, 3 * cache.num_kv_heads, cache.head_dim, dtype=dtype)
    return prefill_jit(cache, key, value, jnp.asarray(lengths, jnp.int32), query=query)


@pytest.fixture
def exact_products():
    """Float32 products in float32: prefill has JAX's default precision, which is TF32 on NVIDIA GPUs."""
    with jax.default_matmul_precision("highest"):
        yield


@jax.jit
def poisoned(cache):
    """The cache with NaN, or inverted bits, wherever no token has been written."""

    def poison(leaf, held):
        held = held.reshape(held.shape + (1,) * (leaf.ndim - held.ndim))
        return jnp.where(held, leaf, jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else ~leaf)

    def poison_store(store):
        dense = poison(store.dense, (cache.ring.positions(cache.packed_lengths) < cache.lengths[:, None])[:, None])
        rows = (jnp.arange(store.packed.shape[2]) < cache.packed_lengths[:, None])[:, None]
        packed = store.packed
        payload = poison(packed.payload, rows if packed.payload.ndim == 4 else rows[..., ::32])
        others = {
            name: None if leaf is None else poison(leaf, rows)
            for name, leaf in (("bitmap", packed.bitmap), ("scale", packed.scale))
        }
        return Store(dense, dataclasses.replace(packed, payload=payload, **others))

    if isinstance(cache, PackedCache):
        return dataclasses.replace(cache, keys=poison_store(cache.keys), values=poison_store(cache.values))
    held = jnp.arange(cache.capacity) < cache.lengths[:, None]
    return dataclasses.replace(cache, key=poison(cache.key, held), value=poison(cache.value, held))


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, PROMPT), min_size=BATCH, max_size=BATCH),
    window=st.sampled_from([None, 1, 200]),  # each is compiled: of none, in the ring, and beyond it
)
@pytest.mark.parametrize(
    "name",
    [
        *(few := ("dense", "recommended", "fast")),
        *exhaustive(*(name for name in CONFIGS if name not in few)),
    ],
)
def test_equals_dense_attention_on_what_is_held(name, seed, lengths, window):
    rng = np.random.default_rng(seed)
    cache = filled(CONFIGS[name], lengths, rng)
    query = normal(rng, BATCH, 6, HEAD_DIM)
    out = attend(query, cache, sliding_window=window)
    expected = attention_on_dense(query, *to_dense(cache), sliding_window=window)
    assert_close(out, expected)
    # The same bits with poison in every slot that no token was written to.
    np.testing.assert_array_equal(attend(query, poisoned(cache), sliding_window=window), out)


@pytest.mark.parametrize("name", ["fast", *exhaustive("dense", "published", "small")])
def test_what_is_not_a_number_comes_out_as_such(name):
    """Of the sequence that has it among its packed keys, and of no other."""
    rng = np.random.default_rng(3)
    key, value, query = (normal(rng, BATCH, 100, heads, HEAD_DIM) for heads in (KV_HEADS, KV_HEADS, 6))
    cache = LayerCache.init(
        CONFIGS[name], batch=BATCH, capacity=100, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32",
        inv_freq=rope_frequencies(HEAD_DIM),
    )  # fmt: skip
    cache = jax.jit(prefill)(cache, key.at[1, 40, 0, 5].set(jnp.nan), value, query=query)
    out = np.asarray(attend(query[:, -1], cache))
    assert np.isnan(out[1, :3]).all()
    assert np.isfinite(out[[0, 2]]).all()


HALVES = [dtype for dtype in DTYPES if dtype != jnp.float32]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(["dense"], DTYPES),
        ("recommended", jnp.bfloat16),
        *exhaustive(*itertools.product(["fast", "small"], HALVES), ("recommended", jnp.float16)),
        *exhaustive(*itertools.product(["recommended", "small"], [jnp.float32])),
    ],
)
def test_equals_dense_attention_in_every_dtype(name, dtype):
    rng = np.random.default_rng(1)
    cache = filled(CONFIGS[name], [300, 63, 1], rng, dtype)
    query = normal(rng, BATCH, 4, HEAD_DIM, dtype=dtype)
    out = attend(query, cache)
    assert out.dtype == dtype
    assert rms_error_ratio(out, attention_on_dense(query, *to_dense(cache))) < TOLERANCE[dtype]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("head_dim", "group"), [(96, 4), *exhaustive((64, 1), (128, 16), (256, 1), (256, 3))])
def test_every_head_dim_and_group(head_dim, group):
    rng = np.random.default_rng(2)
    cache = filled(CONFIGS["small" if head_dim == 96 else "recommended"], [300, 32, 100], rng, head_dim=head_dim)
    query = normal(rng, BATCH, KV_HEADS * group, head_dim)
    assert_close(attend(query, cache), attention_on_dense(query, *to_dense(cache)))


@pytest.mark.exhaustive
def test_after_appending_past_every_boundary():
    rng = np.random.default_rng(3)
    cache = filled(CONFIGS["recommended"], [300, 0, 35], rng)
    for step in range(140):
        cache = append_jit(cache, normal(rng, BATCH, KV_HEADS, HEAD_DIM), normal(rng, BATCH, KV_HEADS, HEAD_DIM))
        if step % 13 == 0:
            query = normal(rng, BATCH, 6, HEAD_DIM)
            for window in (None, 48):
                expected = attention_on_dense(query, *to_dense(cache), sliding_window=window)
                assert_close(attend(query, cache, sliding_window=window), expected)
    assert cache.packed_lengths.tolist() == [384, 96, 128]


@pytest.mark.parametrize("name", ["dense", "recommended"])
def test_a_row_does_not_depend_on_the_others(name):
    rng = np.random.default_rng(4)
    cache, query = filled(CONFIGS[name], [200, 300, 5], rng), normal(rng, BATCH, 6, HEAD_DIM)
    other = filled(CONFIGS[name], [299, 1, 0], rng)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), cache, other)
    np.testing.assert_array_equal(attend(query, mixed)[0], attend(query, cache)[0])
    np.testing.assert_array_equal(attend(query, cache), attend(query, cache))


def test_scale():
    rng = np.random.default_rng(5)
    cache, query = filled(CONFIGS["recommended"], [300, 100, 40], rng), normal(rng, BATCH, 6, HEAD_DIM)
    assert_close(attend(query, cache, scale=0.5), attend(query * 4, cache))


def test_centred_keys_lose_nothing_where_every_entry_is_kept():
    """The mean is taken off and added again: with all entries kept, the dense cache's result."""
    rng = np.random.default_rng(6)
    query, lengths = normal(rng, BATCH, 6, HEAD_DIM), [300, 150, 70]
    kept = CompressionConfig(0.001, 0.001, center_keys=True)
    caches = [filled(config, lengths, np.random.default_rng(7)) for config in (kept, CONFIGS["dense"])]
    assert caches[0].packed_lengths.min() > 0
    assert jnp.abs(caches[0].key_mean).max() > 0.1
    assert_close(*(attend(query, cache) for cache in caches))


PREFILL = [
    ("xla", jnp.float32),
    pytest.param("cudnn", jnp.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cudnn", jnp.float16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("length", [1, 63, 700, 1024])
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize(("implementation", "dtype"), PREFILL)
def test_prefill_attention(length, window, implementation, dtype, exact_products):
    rng = np.random.default_rng(8)
    query, key, value = (normal(rng, 2, length, heads, 32, dtype=dtype) for heads in (4, 2, 2))
    lengths = jnp.array([length, (length + 1) // 2])
    key, value = (x.at[1, (length + 1) // 2 :].set(jnp.nan) for x in (key, value))
    run = jax.jit(prefill_attention, static_argnames=("sliding_window", "implementation"))
    out = run(query, key, value, lengths, sliding_window=window, implementation=implementation)
    assert out.shape == query.shape
    assert out.dtype == dtype
    for row in {0, length // 3, length // 2, length - 1}:
        rows = jnp.minimum(lengths, row + 1)
        key, value = jnp.nan_to_num(key), jnp.nan_to_num(value)
        expected = attention_on_dense(query[:, row], key, value, rows, sliding_window=window)
        valid = np.asarray(lengths) > row
        assert rms_error_ratio(out[valid, row], expected[valid]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_attention_in_every_dtype(dtype, exact_products):
    rng = np.random.default_rng(9)
    query, key, value = (normal(rng, 2, 40, heads, 32, dtype=dtype) for heads in (4, 2, 2))
    out = prefill_attention(query, key, value, jnp.array([40, 40]))
    assert out.dtype == dtype
    expected = attention_on_dense(query[:, -1], key, value, jnp.array([40, 40]))
    assert rms_error_ratio(out[:, -1], expected) < TOLERANCE[dtype]


@functools.partial(jax.jit, static_argnames=("soft_cap", "window"))
def capped_on_dense(query, key, value, lengths, soft_cap, window=None):
    """Attention of query [B, N, H] at position lengths - 1, with a soft cap on its scores, and their log-sum-exp."""
    position, grouped = jnp.arange(key.shape[1])[None], query.reshape(len(query), key.shape[2], -1, query.shape[-1])
    visible = (position < lengths[:, None]) & (lengths[:, None] - position <= (1 << 30 if window is None else window))
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, key, precision="highest") / query.shape[-1] ** 0.5
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jnp.where(visible.any(axis=1)[:, None, None, None], jax.nn.softmax(scores, axis=-1), 0)
    out = jnp.einsum("bkgs,bskh->bkgh", weights, value, precision="highest")
    return out.reshape(query.shape), jax.nn.logsumexp(scores, axis=-1).reshape(query.shape[:2])


@pytest.mark.parametrize("name", ["dense", "recommended", *exhaustive("fast", "small", "published")])
@pytest.mark.parametrize(("soft_cap", "window"), [(3.0, None), *exhaustive((None, 48), (50.0, 48))])
def test_a_soft_cap_and_the_log_sum_exp(name, soft_cap, window):
    rng = np.random.default_rng(12)
    cache, query = filled(CONFIGS[name], [300, 63, 0], rng), normal(rng, BATCH, 6, HEAD_DIM)
    run = jax.jit(decode_attention, static_argnames=("logits_soft_cap", "return_lse", "sliding_window"))
    out, lse = run(query, cache, logits_soft_cap=soft_cap, return_lse=True, sliding_window=window)
    expected = capped_on_dense(query, *to_dense(cache), soft_cap, window)
    assert_close(out, expected[0])
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)
    assert np.isneginf(lse[2]).all()
    np.testing.assert_array_equal(run(query, cache, logits_soft_cap=soft_cap, sliding_window=window), out)


@pytest.mark.parametrize(("soft_cap", "window"), [(3.0, 48), *exhaustive((None, None), (3.0, None))])
@pytest.mark.parametrize("length", [130, *exhaustive(1, 700, 1024)])
def test_prompts_with_a_soft_cap_and_the_log_sum_exp(length, soft_cap, window):
    rng = np.random.default_rng(13)
    query, key, value = (normal(rng, 2, length, heads, 32) for heads in (4, 2, 2))
    lengths = jnp.array([length, (length + 1) // 2])
    broken = [x.at[1, (length + 1) // 2 :].set(jnp.nan) for x in (query, key, value)]
    run = jax.jit(prefill_attention, static_argnames=("logits_soft_cap", "return_lse", "sliding_window"))
    out, lse = run(*broken, lengths, logits_soft_cap=soft_cap, return_lse=True, sliding_window=window)
    for row in {0, length // 3, length // 2, length - 1}:
        valid = np.asarray(lengths) > row
        expected = capped_on_dense(query[:, row], key, value, jnp.minimum(lengths, row + 1), soft_cap, window)
        assert_close(out[valid, row], expected[0][valid])
        np.testing.assert_allclose(lse[valid, row], expected[1][valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [0, -1.0, float("inf"), float("nan"), "50"])
def test_soft_caps_that_are_none(soft_cap):
    query, cache = jnp.ones((BATCH, 6, HEAD_DIM)), empty(CONFIGS["dense"])
    with pytest.raises(ValueError, match=r"logits_soft_cap=.* must be a positive number, or None"):
        decode_attention(query, cache, logits_soft_cap=soft_cap)
    with pytest.raises(ValueError, match=r"logits_soft_cap=.* must be a positive number, or None"):
        prefill_attention(*[query[:, None]] * 3, jnp.ones(BATCH, jnp.int32), logits_soft_cap=soft_cap)


def test_what_kernels_cannot_do_they_say():
    """A cap; several tokens with a window, or very many; cuDNN's log-sum-exp."""
    query, cache = jnp.ones((BATCH, 6, HEAD_DIM), jnp.bfloat16), empty(CONFIGS["recommended"], jnp.bfloat16)
    several = jnp.ones((BATCH, cache.num_kv_heads, 24, HEAD_DIM), jnp.bfloat16)
    for name in ("triton", "mosaic_gpu"):
        with pytest.raises(NotImplementedError, match=r"the kernels have no soft cap; got logits_soft_cap=50\.0"):
            decode_attention(query, cache, logits_soft_cap=50, implementation=name)
        backend = registry.BACKENDS[name]
        for window, new, reason in ((90, 8, "without a sliding window; got sliding_window=90"), (None, 33, "got 33")):
            operands = decode_operands(several, cache, 1.0, window, return_lse=True, new=new)
            assert reason in backend.attend_packed.why_not(operands)
    lengths, prompt = jnp.ones(BATCH, jnp.int32), jnp.ones((BATCH, 8, 2, HEAD_DIM), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="jax's cuDNN attention has no soft cap"):
        prefill_attention(prompt, prompt, prompt, lengths, logits_soft_cap=50, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="jax rounds the log-sum-exp of cuDNN's attention"):
        prefill_attention(prompt, prompt, prompt, lengths, return_lse=True, implementation="cudnn")


def test_implementations_fall_through():
    rng = np.random.default_rng(10)
    cache, query = filled(CONFIGS["recommended"], [300, 100, 40], rng), normal(rng, BATCH, 6, HEAD_DIM)
    expected = attend(query, cache, implementation="xla")
    np.testing.assert_array_equal(attend(query, cache), expected)
    np.testing.assert_array_equal(attend(query, cache, implementation=("cudnn", "xla")), expected)
    with pytest.raises(NotImplementedError, match="implementation='cudnn' does not attend packed caches"):
        attend(query, cache, implementation="cudnn")
    dense = filled(CONFIGS["dense"], [300, 100, 40], rng, jnp.bfloat16)
    half = query.astype(jnp.bfloat16)
    either, xla = (attend(half, dense, implementation=names) for names in (("cudnn", "xla"), "xla"))
    assert rms_error_ratio(either, xla) < TOLERANCE[jnp.bfloat16]
    with pytest.raises(NotImplementedError, match="cuDNN wants bfloat16 or float16; query is float32"):
        attend(query, filled(CONFIGS["dense"], [1, 1, 1], rng), implementation="cudnn")


def test_implementations_of_prefill_fall_through():
    rng = np.random.default_rng(11)
    query, key, value = (normal(rng, 1, 40, heads, 32) for heads in (4, 2, 2))
    run = functools.partial(prefill_attention, query, key, value, jnp.array([40]))
    expected = run(implementation="xla")
    for names in (None, ("cudnn", "xla"), ["triton", "xla"]):
        np.testing.assert_array_equal(run(implementation=names), expected)
    with pytest.raises(NotImplementedError, match="cuDNN wants bfloat16 or float16; query is float32"):
        run(implementation="cudnn")
    with pytest.raises(NotImplementedError, match=r"'triton' does not attend prompts; wanted one of.*'cudnn', 'xla'"):
        run(implementation="triton")
    with pytest.raises(ValueError, match="sliding_window=0 must be"):
        run(sliding_window=0)


@pytest.mark.parametrize("name", ["dense", "recommended"])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"query has shape \(3, 6, 32\); the cache wants \[3, N, 64\]", {"query": jnp.ones((3, 6, 32))}),
        (r"query has shape \(2, 6, 64\)", {"query": jnp.ones((2, 6, 64))}),
        (r"query has shape \(3, 1, 6, 64\)", {"query": jnp.ones((3, 1, 6, 64))}),
        ("query has 5 heads; wanted a multiple of the cache's 2", {"query": jnp.ones((3, 5, 64))}),
        ("sliding_window=0 must be an integer of at least 1", {"sliding_window": 0}),
        ("sliding_window=48.0 must be an integer", {"sliding_window": 48.0}),
        ("implementation='pallas' must be one of", {"implementation": "pallas"}),
        ("implementation='pallas' must be one of", {"implementation": ("xla", "pallas")}),
        (r"implementation=\(\) names none", {"implementation": ()}),
        ("implementation='' names none", {"implementation": ""}),
    ],
)
def test_bad_arguments(name, message, options):
    with pytest.raises(ValueError, match=message):
        decode_attention(**{"query": jnp.ones((BATCH, 6, HEAD_DIM)), "cache": empty(CONFIGS[name])} | options)


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(registry, "on_cuda", lambda: True)


def test_none_tries_the_fastest_kernel_first(monkeypatch):
    """On a GPU; each kernel here says that it cannot run."""
    seen = []

    def refuse(name, *_):
        seen.append(name)
        raise NotImplementedError(name)

    for name in ("mosaic_gpu", "triton"):
        replace_backend(monkeypatch, name, attend_packed=Operation(functools.partial(refuse, name)))
    on_a_gpu(monkeypatch)
    cache = empty(CompressionConfig(), batch=1, num_kv_heads=1)
    jax.eval_shape(decode_attention, jnp.zeros((1, 9, HEAD_DIM)), cache)
    assert seen == ["mosaic_gpu", "triton"]


@pytest.mark.exhaustive
def test_a_jax_without_pallas_s_backends_attends_packs_and_multiplies_through_xla(monkeypatch):
    """On a GPU."""
    on_a_gpu(monkeypatch)
    for name in ("triton", "mosaic_gpu"):
        monkeypatch.setitem(sys.modules, f"jax.experimental.pallas.{name}", None)
    rng = np.random.default_rng(7)
    cache, query = (
        filled(CompressionConfig(), jnp.array([90, 70, 3]), rng, jnp.bfloat16),
        normal(rng, BATCH, 2, HEAD_DIM),
    )
    query = query.astype(jnp.bfloat16)
    packed = pack(query[None], jnp.ones((1, *query.shape), bool))
    for run, arguments in (
        (decode_attention, (query, cache)),
        (append, (cache, query, query)),
        (key_spmv, (query[None, :, :1], packed)),
    ):
        jax.tree.map(np.testing.assert_array_equal, run(*arguments), run(*arguments, implementation="xla"))
    with pytest.raises(NotImplementedError, match=r"jax .* lacks jax.experimental.pallas.triton"):
        decode_attention(query, cache, implementation="triton")


@pytest.mark.parametrize("module", ["triton.decode_attention", "mosaic.decode_attention"])
def test_a_broken_installation_is_an_import_error(module, monkeypatch):
    """Not a kernel that cannot run: it must not silently mean XLA."""
    on_a_gpu(monkeypatch)
    for name in [name for name in sys.modules if name.startswith("mustafar_jax.pallas_kernels.")]:
        if name.endswith(module):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, f"mustafar_jax.pallas_kernels.{module}", None)
    backend = {"triton": "triton", "mosaic": "mosaic_gpu"}[module.partition(".")[0]]
    cache = empty(CompressionConfig(), batch=1, dtype=jnp.bfloat16)
    query = jnp.zeros((1, KV_HEADS, HEAD_DIM), jnp.bfloat16)
    with pytest.raises(ImportError, match=module):
        decode_attention(query, cache, implementation=(backend, "xla"))


def test_only_a_default_device_with_cuda_gets_kernels():
    for device in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(device):
            assert not registry.on_cuda()
    assert registry.on_cuda() == (jax.default_backend() == "gpu")
