"""Prune and pack's kernel against pruning and packing through XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax.backend import Operation
from mustafar_jax.backends.xla.packing import pack as xla_pack
from mustafar_jax.cache import packed as packed_cache
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import backend
from mustafar_jax.pallas_kernels.triton.prune_pack import Prune, prune_pack
from mustafar_jax.pruning import rescale_to_norm
from mustafar_jax.rows import RowFormat
from tests.helpers import (
    CONFIGS,
    adversarial,
    bits,
    exhaustive,
    magnitude_mask,
    mean_at,
    pack,
    replace_backend,
    rope_frequencies,
    unpack,
)
from tests.pallas_kernels.data import everywhere, jit, rows_of_words
from tests.pallas_kernels.lowering import describe, lower_for_cuda, pairwise

BF16, F16 = jnp.bfloat16, jnp.float16


def data(rng, shape, dtype):
    """[B, S, K, H], each token of another kind: random, with ties, of any bits, all equal, of very unequal channels."""
    normal = rng.standard_normal(shape)
    skewed = normal * np.exp(3 * rng.standard_normal(shape[-1]))
    kinds = [normal, normal.round(), np.sign(normal), skewed]
    kinds = [np.asarray(jnp.asarray(x, dtype)) for x in kinds] + [np.asarray(adversarial(rng, shape, dtype))]
    kind = rng.integers(0, len(kinds), (*shape[:-1], 1))
    picked = np.select([kind == i for i in range(len(kinds))], [x.view(np.int16) for x in kinds])
    return jnp.asarray(picked.view(kinds[0].dtype))


def poisoned(rng, batch, kv_heads, rows, head_dim, kept, dtype):
    """Packed rows of any bits."""
    empty = RowFormat(head_dim, np.dtype(dtype), kept).empty((batch, kv_heads), rows)
    words = rng.integers(0, 2**32, empty.bitmap.shape, dtype=np.uint32)
    return dataclasses.replace(empty, bitmap=jnp.asarray(words), payload=adversarial(rng, empty.payload.shape, dtype))


def written(target, x, mask, first, start, held, rows):
    """The target with rows first .. of x [B, K, S, H] in it, through XLA; as numpy arrays, the payload as bits."""
    words, values = np.array(target.bitmap), bits(target.payload).copy()
    x, mask = np.asarray(x), np.asarray(mask)  # XLA may rewrite NaN where it slices 16-bit numbers on a CPU
    for b in range(x.shape[0]):
        if start[b] >= words.shape[2]:
            continue
        taken = slice(first[b], first[b] + held[b])
        packed = pack(x[b, :, taken], mask[b, :, taken], slots=values.shape[3] * values.shape[5])
        here = slice(start[b], start[b] + rows)
        words[b, :, here], values[b, :, start[b] // 32 : (start[b] + rows) // 32] = 0, 0
        words[b, :, start[b] : start[b] + held[b]] = packed.bitmap
        values[b, :, start[b] // 32 : (start[b] + held[b]) // 32] = bits(packed.payload)
    return dataclasses.replace(target, bitmap=words, payload=values)


def unpacked(packed):
    """Packed rows as bits, and where an entry is held, [B, K, S, H]; values as they are or as bits."""
    rows = rows_of_words(jnp.asarray(packed.bitmap), jnp.asarray(packed.payload).view(jnp.float16))
    return bits(unpack(rows)), np.asarray(rows.mask())


# batch, KV heads, tokens, head_dim, entries kept of keys and of values, dtype, axis of heads, first, start, held, rows
CASES = {
    "prompt": (3, 1, 1000, 64, (20, 32), BF16, 2, [4, 4, 4], [0, 0, 0], [960, 0, 32], 960),
    "group": (3, 2, 160, 128, (40,), F16, 1, [36, 0, 96], [32, 96, 160], [64, 64, 64], 64),
}


@pytest.mark.parametrize(("case", "interpret"), everywhere(CASES, ["group"]))
def test_is_bit_equal_to_xla(case, interpret):
    batch, kv_heads, tokens, head_dim, kept, dtype, head_axis, first, start, held, rows = CASES[case]
    rng = np.random.default_rng(1)
    sources = [data(rng, (batch, kv_heads, tokens, head_dim), dtype) for _ in kept]
    targets = [poisoned(rng, batch, kv_heads, max(rows, 160), head_dim, count, dtype) for count in kept]

    @functools.partial(jit, interpret=interpret)
    def run(sources, targets):
        prunes = [Prune(x if head_axis == 1 else x.swapaxes(1, 2), t) for x, t in zip(sources, targets, strict=True)]
        ranges = (jnp.array(x, jnp.int32) for x in (first, start, held))
        return prune_pack(prunes, *ranges, rows=rows, head_axis=head_axis, interpret=interpret)

    actual = run(sources, targets)
    again = actual if interpret else run(sources, targets)
    for i, (x, count) in enumerate(zip(sources, kept, strict=True)):
        wanted = written(targets[i], x, magnitude_mask(x, 1 - count / head_dim), first, start, held, rows)
        np.testing.assert_array_equal(actual[i].bitmap, wanted.bitmap)
        np.testing.assert_array_equal(bits(actual[i].payload), wanted.payload)
        np.testing.assert_array_equal(again[i].bitmap, actual[i].bitmap)
        np.testing.assert_array_equal(bits(again[i].payload), wanted.payload)


def within_an_ulp(actual, expected):
    """Where the bits of 16-bit floating-point entries agree but for the last one."""
    return np.abs(actual.astype(np.int32) - expected.astype(np.int32)) <= 1


HALF_INTERPRETED = [
    pytest.param(64, BF16, True, id="interpret"),
    pytest.param(128, BF16, False, marks=pytest.mark.gpu, id="device-128"),
    pytest.param(64, F16, False, marks=pytest.mark.gpu, id="device-64"),
]
FIRST, START, HELD = np.array([4, 8]), np.array([0, 32]), np.array([64, 64])


def pruned(x, target, *, interpret, **fields):
    """The target with rows of x in it, three quarters of their entries removed; `fields` of `Prune`."""

    @functools.partial(jit, interpret=interpret)
    def run(x, target):
        prune = Prune(x, target, **fields)
        return prune_pack([prune], FIRST, START, HELD, rows=64, head_axis=1, interpret=interpret)

    [actual] = run(x, target)
    return actual


def weights(rng, *shape):
    """Some of them so small that what is ranked is subnormal in float16; some zero."""
    return jnp.asarray(np.exp(3 * rng.standard_normal(shape) - 8) * (rng.random(shape) > 0.1), jnp.float32)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "interpret"),
    # interpreted, the keys that are centred below are weighed as well
    [*exhaustive(HALF_INTERPRETED[0].values), *HALF_INTERPRETED[1:]],
)
def test_weighed_keys_are_bit_equal_to_xla(head_dim, dtype, interpret):
    rng = np.random.default_rng(10)
    x, weight = data(rng, (2, 2, 72, head_dim), dtype), weights(rng, 2, 2, head_dim)
    target = poisoned(rng, 2, 2, 96, head_dim, head_dim // 4, dtype)

    actual = pruned(x, target, weight=weight, interpret=interpret)
    ranked = (x.astype(jnp.float32) * weight[:, :, None]).astype(dtype)
    wanted = written(target, x, magnitude_mask(ranked, 0.75), FIRST, START, HELD, 64)
    np.testing.assert_array_equal(actual.bitmap, wanted.bitmap)
    np.testing.assert_array_equal(bits(actual.payload), wanted.payload)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 64), jnp.float32), ((2, 2, 64), jnp.float16)])
def test_weights_of_another_form_are_refused(shape, dtype):
    rng = np.random.default_rng(11)
    x, target = data(rng, (2, 2, 72, 64), F16), poisoned(rng, 2, 2, 96, 64, 16, F16)
    with pytest.raises(ValueError, match=r"weight is float.*; wanted float32 \[2, 2, 64\]"):
        pruned(x, target, weight=jnp.ones(shape, dtype), interpret=True)


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "message"),
    [
        (48, (2, 2, 72, 64), F16, "rows=48 must be a multiple of 32"),
        (64, (2, 2, 40, 64), F16, r"source is float16\[2, 2, 40, 64\] .*; wanted float16\[2, 2, 72, 64\]"),
        (64, (2, 2, 72, 64), jnp.bfloat16, "source is float16.* and its target bfloat16; wanted float16"),
    ],
)
def test_sources_and_targets_that_do_not_go_together_are_refused(rows, shape, dtype, message):
    rng = np.random.default_rng(12)
    target = poisoned(rng, 2, 2, 96, 64, 16, F16)
    other = dataclasses.replace(target, payload=target.payload.astype(dtype))
    prunes = [Prune(data(rng, (2, 2, 72, 64), F16), target), Prune(data(rng, shape, F16), other)]
    with pytest.raises(ValueError, match=message):
        prune_pack(prunes, FIRST, START, HELD, rows=rows, head_axis=1, interpret=True)


@pytest.mark.parametrize("weighed", [False, *exhaustive(True)])
@pytest.mark.parametrize(("head_dim", "dtype", "interpret"), HALF_INTERPRETED)
def test_centred_keys_agree_but_for_the_last_bit(head_dim, dtype, weighed, interpret):
    """What is left of keys after the mean is taken off; masks differ only where that of two entries is as close."""
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((2, 1, 72, head_dim)) + 1, dtype)
    key = jnp.asarray(rng.standard_normal((2, 1, head_dim)), jnp.float32)
    mean = Mean(key, rope_frequencies(head_dim), 4)
    weight = jnp.asarray(rng.uniform(0.1, 1, (2, 1, head_dim)), jnp.float32) if weighed else None
    target = poisoned(rng, 2, 1, 96, head_dim, head_dim // 4, dtype)

    actual = pruned(x, target, mean=mean, weight=weight, interpret=interpret)
    rows = np.arange(72) + (START - FIRST)[:, None]
    centred = x.astype(jnp.float32) - jnp.asarray(mean_at(mean, rows[:, None]))
    ranked = (centred if weight is None else centred * weight[:, :, None]).astype(dtype)
    entries, kept = unpacked(actual)
    masked = written(target, centred.astype(dtype), magnitude_mask(ranked, 0.75), FIRST, START, HELD, 64)
    expected, wanted = unpacked(masked)
    one, other = (x.view(jnp.dtype(dtype)).astype(np.float32)[kept & wanted] for x in (entries, expected))
    np.testing.assert_allclose(one, other, rtol=float(jnp.finfo(dtype).eps), atol=3e-5)
    assert (one == other).mean() > 0.95
    assert (kept == wanted).mean() > (0.9997 if interpret else 0.999)  # 0.9995 if rounded before they are weighed
    ranks = np.zeros(kept.shape, np.int32)
    for b in range(2):
        here, there = slice(START[b], START[b] + 64), slice(FIRST[b], FIRST[b] + 64)
        ranks[b, :, here] = bits(ranked)[b, :, there] & 0x7FFF
        assert not (kept != wanted)[b, :, : START[b]].any()
    least = np.where(wanted, ranks, 0x7FFF).min(axis=-1, keepdims=True)
    assert (np.abs(ranks - least)[kept != wanted] <= 1).all()


@pytest.mark.parametrize(("head_dim", "dtype", "interpret"), HALF_INTERPRETED)
@pytest.mark.exhaustive
def test_rescaled_values_agree_but_for_the_last_bit(head_dim, dtype, interpret):
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.standard_normal((2, 1, 72, head_dim)), dtype)
    x = x.at[0, 0, 5].set(0).at[0, 0, 6, 3].set(jnp.inf).at[0, 0, 7, 3].set(jnp.nan).at[0, 0, 8].multiply(2e4)
    target = poisoned(rng, 2, 1, 96, head_dim, head_dim // 4, dtype)

    actual = pruned(x, target, rescale=True, interpret=interpret)
    mask = magnitude_mask(x, 0.75)
    wanted = written(target, rescale_to_norm(x, mask), mask, FIRST, START, HELD, 64)
    np.testing.assert_array_equal(actual.bitmap, wanted.bitmap)
    assert within_an_ulp(bits(actual.payload), wanted.payload).all()


@pytest.mark.parametrize(
    ("sparsities", "weigh", "interpret"),
    [
        pytest.param((0.5, 0), True, True, id="interpret", marks=pytest.mark.exhaustive),
        pytest.param((0.5, 0), False, False, marks=pytest.mark.gpu, id="device-keys"),
        pytest.param((0.7, 0.5), True, False, marks=pytest.mark.gpu, id="device-both"),
    ],
)
def test_fills_a_cache_as_xla_does(sparsities, weigh, interpret, monkeypatch):
    """Bit for bit, in prefill and while tokens are appended; sequences fill their groups at different steps."""
    pack = functools.partial(backend.pack, interpret=interpret)
    replace_backend(monkeypatch, "triton", pack=Operation(pack))
    # it is jitted by itself, where both values of `interpret` could share one trace
    monkeypatch.setattr(packed_cache, "_pack_leaving", packed_cache._pack_leaving.__wrapped__)
    rng = np.random.default_rng(9)
    config = mj.CompressionConfig(*sparsities, sink_tokens=2, group=64 if interpret else 128, weigh_keys=weigh)
    key, value = (data(rng, (3, 260, 1, 64), F16) for _ in range(2))
    query = jnp.asarray(rng.standard_normal((3, 200, 2, 64)) * np.exp(rng.standard_normal(64)), F16)
    lengths, caches = jnp.array([1, 63, 200]), []
    for name in ("triton", "xla"):
        fill = jit(functools.partial(mj.prefill, implementation=name), interpret=interpret)
        append = jit(functools.partial(mj.append, implementation=name), interpret=interpret, donate_argnums=0)
        held = mj.LayerCache.init(config, batch=3, capacity=300, num_kv_heads=1, head_dim=64, dtype=F16)
        held = fill(held, key[:, :200], value[:, :200], lengths, query=query)
        for step in range(200, 260):
            held = append(held, key[:, step], value[:, step])
        caches.append(held)
    for one, other in zip(*map(jax.tree.leaves, caches), strict=True):
        as_bits = bits if one.dtype == F16 else np.asarray
        np.testing.assert_array_equal(as_bits(one), as_bits(other))


def test_a_step_decides_nothing_on_the_host():
    """XLA's conditional waits for its predicate; the kernel itself passes over what is not full."""
    held = jax.eval_shape(
        lambda: mj.LayerCache.init(
            mj.CompressionConfig(), batch=2, capacity=256, num_kv_heads=2, head_dim=64, dtype=BF16
        )
    )
    token = jax.ShapeDtypeStruct((2, 2, 64), BF16)
    by_kernel, by_xla = (
        lower_for_cuda(functools.partial(mj.append, implementation=name), held, token, token)
        for name in ("triton", "xla")
    )
    assert "triton" in by_kernel
    whether_any = "applies stablehlo.or across dimensions = [0]"  # the predicate, over the batch
    assert whether_any in by_xla
    assert whether_any not in by_kernel


def test_falls_through_to_xla():
    key = jnp.ones((1, 100, 1, 64), F16)
    for config in (mj.CompressionConfig(), mj.CompressionConfig(v_method="think")):
        held = mj.LayerCache.init(config, batch=1, capacity=128, num_kv_heads=1, head_dim=64, dtype=F16)
        assert mj.prefill(held, key, key, implementation=("triton", "xla")).lengths == 100
    with pytest.raises(NotImplementedError, match="by magnitude"):
        jax.eval_shape(functools.partial(mj.prefill, implementation="triton"), held, key, key)
    with pytest.raises(NotImplementedError, match="'cudnn' does not prune and pack"):
        mj.prefill(held, key, key, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation='fast' must be one of"):
        mj.append(held, key[:, 0], key[:, 0], implementation="fast")


def specs(batch, kv_heads, tokens, head_dim, kept, dtype, head_axis):
    shape = [batch, tokens, kv_heads, head_dim] if head_axis == 2 else [batch, kv_heads, tokens, head_dim]
    how = RowFormat(head_dim, np.dtype(dtype), kept)
    return Prune(jax.ShapeDtypeStruct(shape, dtype), jax.eval_shape(lambda: how.empty((batch, kv_heads), tokens)))


AXES = {
    "kept": ["one slot chunk", "in eights", "in fours", "all"],
    "sides": ["keys", "values", "both"],
    "head_dim": [64, 128],
    "dtype": [BF16, F16],
    "head_axis": [1, 2],
    "centred": [False, True],
    "weighed": [False, True],
    "rescale": [False, True],
}
KEPT = {"one slot chunk": lambda _: 4, "in eights": lambda h: h // 4 + 8, "in fours": lambda h: h // 4 + 4, "all": int}


@pytest.mark.parametrize(
    "case", [*pairwise(AXES)[:2], *exhaustive(*((case,) for case in pairwise(AXES)[2:]))], ids=describe
)
def test_lowers_for_cuda(case):
    """Any two choices occur together."""
    head_dim = case["head_dim"]
    prune = specs(2, 4, 128, head_dim, KEPT[case["kept"]](head_dim), case["dtype"], case["head_axis"])
    mean = jax.ShapeDtypeStruct((2, 4, head_dim), jnp.float32)
    ranges = [jax.ShapeDtypeStruct((2,), jnp.int32)] * 3

    def call(source, target, mean, ranges):
        taken_off = Mean(mean, rope_frequencies(head_dim), 4) if case["centred"] else None
        weight = mean if case["weighed"] else None
        keys = Prune(source, target, taken_off, weight=weight)
        values = Prune(source, target, rescale=case["rescale"])
        chosen = {"keys": [keys], "values": [values], "both": [keys, values]}[case["sides"]]
        return prune_pack(chosen, *ranges, rows=64, head_axis=case["head_axis"])

    assert "triton" in lower_for_cuda(call, *prune[:2], mean, ranges)


def operations(jaxpr):
    """How many, those of inner functions and kernels among them."""
    inner = [getattr(x, "jaxpr", x) for equation in jaxpr.eqns for x in jax.tree.leaves(list(equation.params.values()))]
    return len(jaxpr.eqns) + sum(operations(x) for x in inner if hasattr(x, "eqns"))


def test_compiles_soon():
    """The compiler takes a time that grows with the square of the operations: see docs/kernels.md, "Compiling"."""
    (source, target, *_), (_, other, *_) = (specs(8, 8, 4096, 128, kept, BF16, 2) for kept in (40, 44))
    mean = jax.ShapeDtypeStruct((8, 8, 128), jnp.float32)
    ranges = [jax.ShapeDtypeStruct((8,), jnp.int32)] * 3

    def call(source, key, value, mean, ranges):
        keys = Prune(source, key, Mean(mean, rope_frequencies(128), 4), weight=mean)
        return prune_pack([keys, Prune(source, value, rescale=True)], *ranges, rows=64, head_axis=2)

    assert 1000 < operations(jax.make_jaxpr(call)(source, target, other, mean, ranges).jaxpr) < 2000


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"), [(96, BF16, "head_dim=96"), (64, jnp.float32, "float32"), (256, F16, "256")]
)
def test_says_what_it_cannot_run(head_dim, dtype, message):
    prune = specs(1, 1, 64, head_dim, 32, dtype, 2)
    ranges = [jax.ShapeDtypeStruct((1,), jnp.int32)] * 3
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda s, t, r: prune_pack([Prune(s, t)], *r, rows=32, head_axis=2), *prune[:2], ranges)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["fast", *exhaustive("published", "dense keys", "small")])
def test_groups_that_leave_at_once_near_the_end_of_a_cache(name):
    """More rows than there is room for, of which each sequence has its own number: the others stay as they are."""
    sizes = {"batch": 3, "capacity": 128, "num_kv_heads": 1, "head_dim": 64, "dtype": jnp.bfloat16}
    cache = mj.LayerCache.init(CONFIGS[name], **sizes, inv_freq=rope_frequencies(64))
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((3, 100, 1, 64)), jnp.bfloat16) for _ in range(3))
    cache = jax.jit(mj.prefill)(cache, key, value, jnp.array([100, 70, 40]), query=query)
    lengths, packed = jnp.array([128, 128, 90]), cache.config.packed_tokens(128)

    @jax.jit
    def both(cache):
        leaving = cache._leaving(key[:, :64], value[:, :64], lengths)
        packing = dataclasses.replace(cache, lengths=lengths).packing(leaving)
        assert packing.rows == 64
        return backend.pack(packing, interpret=True), xla_pack(packing)

    for kernels, xla in zip(*both(cache), strict=True):
        for row, length in enumerate(lengths.tolist()):
            there = np.arange(packed) < cache.config.packed_tokens(length)
            actual, expected = (np.asarray(unpack(rows), np.float32)[row][:, there] for rows in (kernels, xla))
            np.testing.assert_allclose(actual, expected, atol=0.02)
