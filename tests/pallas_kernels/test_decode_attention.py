"""Decode attention's kernels, of Triton and of Mosaic GPU, against attention on the pruned tensors in float32."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax.attention import decode_operands
from mustafar_jax.backends.xla.attention import attend_packed
from mustafar_jax.operands import Mean, PackedAttention, Tail, restored
from mustafar_jax.pallas_kernels.mosaic import backend as mosaic_backend
from mustafar_jax.pallas_kernels.mosaic import decode_attention as mosaic_decode_attention
from mustafar_jax.pallas_kernels.mosaic.launch import MosaicParams
from mustafar_jax.pallas_kernels.triton import backend as triton_backend
from mustafar_jax.pallas_kernels.triton import decode_attention
from mustafar_jax.pallas_kernels.triton.launch import DecodeParams
from tests.helpers import bits, exhaustive, rms_error_ratio, rope_frequencies
from tests.pallas_kernels.data import (
    TOLERANCE,
    attend,
    coded_rows,
    jit,
    merge_splits,
    poison,
    pruned_codes,
    rows_of,
    specs,
    with_mean,
)
from tests.pallas_kernels.lowering import describe, lower_for_cuda, pairwise

BF16, F16 = jnp.bfloat16, jnp.float16


class Kernel(NamedTuple):
    name: str
    module: Any
    params: Callable[[int], Any]  # of a number of splits
    backend: Any


KERNELS = [
    Kernel("triton", decode_attention, DecodeParams, triton_backend),
    Kernel("mosaic_gpu", mosaic_decode_attention, MosaicParams, mosaic_backend),
]
TRITON, MOSAIC = KERNELS


def runs(*kernels):
    """Parameters: kernels, each interpreted and on a device."""
    return [
        pytest.param(kernel, interpret, id=f"{kernel.name}-{where}", marks=[] if interpret else pytest.mark.gpu)
        for kernel in kernels
        for interpret, where in ((True, "interpret"), (False, "device"))
    ]


RUNS = runs(*KERNELS)
INTERPRETED, *ON_A_DEVICE = runs(TRITON)
FEW_RUNS = [*exhaustive(INTERPRETED.values), *ON_A_DEVICE, *runs(MOSAIC)]
"""The same, Triton's interpreted kernels left to --exhaustive."""


def runs_of(cases, by_triton):
    """Parameters (case, kernel, interpret); `by_triton` says whether Triton's kernels take a case."""

    def marks(case, run):
        further = run.values[0] == TRITON and case.values[0] in FURTHER_OF_TRITON
        return [*case.marks, *run.marks, *([pytest.mark.exhaustive] if further else [])]

    return [
        pytest.param(
            *case.values, *run.values, id=f"{'-'.join(map(str, case.values))}-{run.id}", marks=marks(case, run)
        )
        for case in (x if isinstance(x, type(pytest.param())) else pytest.param(x) for x in cases)
        for run in runs(*(KERNELS if by_triton(*case.values) else [MOSAIC]))
    ]


class Sequence(NamedTuple):
    mask: str  # see `data.masks`
    first: int  # the rows that it sees
    last: int


class Case(NamedTuple):
    """One compilation; the sequences of its batch differ in their masks and in what they see."""

    head_dim: int
    dtype: Any
    group: int
    k_sparsity: float
    v_sparsity: float
    rows: int
    splits: int
    sequences: list[Sequence]
    kv_heads: int = 1
    centred: bool = False
    k_bits: int = 16  # of codes; 16 for plain numbers
    v_bits: int = 16
    turned: bool = False  # whether keys are coded as a rotation leaves them
    warps: int = 4

    @property
    def inv_freq(self):
        """Of which half the pairs are fast at head_dim 64, a fourth at 128."""
        return rope_frequencies(self.head_dim, 1e4 if self.head_dim == 64 else 5e5)

    @property
    def is_coded(self):
        return self.k_bits < 16 or self.v_bits < 16

    @property
    def by_triton(self):
        """Codes are for Triton where both sides are, without a bitmap."""
        return not self.is_coded or (max(self.k_bits, self.v_bits) < 16 and self.k_sparsity == self.v_sparsity == 0)


RAGGED = [
    Sequence("magnitude", 0, 63),
    Sequence("skewed", 130, 200),
    Sequence("unequal", 0, 230),
    Sequence("magnitude", 40, 41),
    Sequence("unequal", 7, 7),
]
LONG = [Sequence("magnitude", 0, 1000), Sequence("skewed", 0, 1), Sequence("unequal", 700, 1000)]
CASES = {
    "1000 rows": Case(128, BF16, 1, 0.7, 0.7, 1000, 3, LONG),
    "two KV heads": Case(64, F16, 16, 0.7, 0.5, 230, 2, RAGGED[:3], kv_heads=2),
    "8 query heads, slots in fours": Case(128, F16, 8, 0.72, 0.96, 96, 1, [RAGGED[0], Sequence("unequal", 5, 96)]),
    "dense keys": Case(128, F16, 2, 0, 0.5, 256, 2, RAGGED),
    "dense values": Case(64, BF16, 3, 0.5, 0, 256, 3, RAGGED),
    "centred": Case(128, BF16, 4, 0.5, 0.5, 320, 1, [*RAGGED, Sequence("magnitude", 40, 310)], centred=True),
    "centred, 1 query head": Case(128, F16, 1, 0.7, 0.7, 1000, 3, LONG, centred=True),
    "centred, 2 query heads": Case(64, BF16, 2, 0.7, 0.5, 230, 2, RAGGED[:3], centred=True),
    "centred, 7 query heads": Case(128, BF16, 7, 0.7, 0.5, 230, 2, RAGGED, centred=True),
    "centred, 16 query heads": Case(64, BF16, 16, 0.5, 0.7, 230, 2, RAGGED[:3], kv_heads=2, centred=True),
    "centred, all held": Case(64, F16, 3, 0.7, 0.01, 230, 2, RAGGED, centred=True),
    "4 bits": Case(128, BF16, 1, 0, 0, 1000, 3, LONG, k_bits=4, v_bits=4),
    "4 bits, turned and centred": Case(
        128, BF16, 4, 0, 0, 320, 1, [*RAGGED, Sequence("", 40, 310)], 2, True, 4, 4, turned=True
    ),
    "keys in 4 bits, values in 2": Case(64, F16, 7, 0, 0, 230, 2, RAGGED, 1, True, 4, 2, turned=True, warps=8),
    "2 bits, 16 query heads": Case(128, F16, 16, 0, 0, 160, 1, RAGGED[:3], 1, True, 2, 2, turned=True),
    "8 bits": Case(64, F16, 2, 0, 0, 230, 2, RAGGED, k_bits=8, v_bits=8, turned=True),
    "keys in 8 bits, values in 4": Case(128, BF16, 9, 0, 0, 96, 1, [RAGGED[0], Sequence("", 5, 96)], 1, False, 8, 4),
    "keys in 2 bits, values in 8": Case(64, BF16, 3, 0, 0, 96, 1, [RAGGED[0], Sequence("", 5, 96)], 1, True, 2, 8),
    "keys pruned, values in 4 bits": Case(128, BF16, 1, 0.7, 0, 230, 2, RAGGED, 1, True, v_bits=4),
    "keys in 4 bits, values pruned": Case(64, F16, 4, 0, 0.7, 230, 2, RAGGED, 1, True, k_bits=4, turned=True),
    "keys pruned in 4 bits, values in 2": Case(128, BF16, 4, 0.7, 0, 230, 2, RAGGED, 1, True, 4, 2),
    "keys pruned in 4 bits, values pruned": Case(64, F16, 1, 0.7, 0.5, 230, 2, RAGGED, 2, False, 4),
    "keys pruned in 4 bits, dense values": Case(64, BF16, 9, 0.5, 0, 96, 1, RAGGED[:2], 1, True, 4),
    "dense keys, values in 2 bits": Case(64, F16, 2, 0, 0, 96, 1, RAGGED[:1], v_bits=2),
    "keys in 2 bits, dense values": Case(128, BF16, 2, 0, 0, 96, 1, RAGGED[:1], k_bits=2),
}
FURTHER = ["1000 rows", "centred", "centred, 7 query heads", "centred, 16 query heads"]
FURTHER += ["centred, all held", "centred, 1 query head", "dense keys", "8 query heads, slots in fours"]
FURTHER += ["keys pruned in 4 bits, values pruned", "keys in 2 bits, dense values", "two KV heads", "4 bits"]
FURTHER += ["keys in 2 bits, values in 8", "keys pruned, values in 4 bits", "keys in 4 bits, values pruned"]
FURTHER += [
    "keys pruned in 4 bits, dense values",
    "2 bits, 16 query heads",
    "keys in 8 bits, values in 4",
    "dense keys, values in 2 bits",
]
"""Each differs from another case in a size or two, and compiles for seconds."""
FURTHER_OF_TRITON = ["8 bits", "keys in 2 bits, values in 8", "balanced, window", "recommended", "dense keys"]
FURTHER_OF_TRITON += ["two KV heads", "dense values", "keys in 4 bits, values in 2", "small", "window"]
FURTHER_OF_TRITON += ["centred, 2 query heads", "fast"]
"""The same, interpreted by Triton's kernels."""


class Data(NamedTuple):
    arguments: tuple[Any, ...]  # of `attend_rows`; NaN and arbitrary bitmaps where a sequence sees nothing
    mean: Mean | None
    expected: tuple[jax.Array, jax.Array, jax.Array]


@functools.cache
def data(name):
    """What a case's kernels take, and the reference's answer."""
    case, rng = CASES[name], np.random.default_rng(1)
    masks, firsts, lasts = zip(*case.sequences, strict=True)
    first, last = (jnp.array(x, jnp.int32) for x in (firsts, lasts))
    shape = (len(masks), case.kv_heads, case.rows, case.head_dim)
    query = jnp.asarray(rng.standard_normal((*shape[:2], case.group, case.head_dim)), case.dtype)

    def rows(sparsity, bits, pairs, turned):
        if bits == 16:
            return rows_of(rng, shape, case.dtype, sparsity, masks)
        if sparsity:
            return pruned_codes(rng, shape, case.dtype, sparsity, masks)
        return coded_rows(rng, shape, case.dtype, bits, pairs, turned=turned)

    key, dense_key = rows(case.k_sparsity, case.k_bits, "channels", case.turned)
    value, dense_value = rows(case.v_sparsity, case.v_bits, "tokens", False)
    mean = None
    if case.centred:
        mean = Mean(jnp.asarray(rng.standard_normal((*shape[:2], case.head_dim)), jnp.float32), case.inv_freq, 4)
        dense_key = with_mean(dense_key, mean)
    expected = attend(query, dense_key, dense_value, first, last, case.head_dim**-0.5)
    key, value = (poison(x, outside(x, first, last)) for x in (key, value))
    return Data((query, key, value, first, last), mean, expected)


def outside(rows, first, last):
    """Bool [B, S]: which rows a sequence does not see."""
    row = np.arange(rows.padded_length)
    return (row < np.asarray(first)[:, None]) | (row >= np.asarray(last)[:, None])


@functools.cache
def compiled(name, kernel, interpret):
    """The kernel and a merge of its splits: (out, m, l) as `attend` returns them."""
    case = CASES[name]
    options = {"scale": case.head_dim**-0.5, "params": kernel.params(case.splits), "interpret": interpret}
    if case.is_coded:
        options["turned_keys"] = case.turned
        if kernel == MOSAIC:
            options["params"] = MosaicParams(case.splits, case.warps)

    def call(query, key, value, first, last, mean_key):
        mean = Mean(mean_key, case.inv_freq, 4) if case.centred else None
        parts = kernel.module.attend_rows(query, key, value, first, last, mean=mean, **options)
        return merge_splits(query, *parts)

    return jit(call, interpret=interpret)


def run(name, kernel, interpret, arguments):
    mean = data(name).mean
    return jax.block_until_ready(compiled(name, kernel, interpret)(*arguments, mean and mean.key))


@functools.cache
def answer(name, kernel, interpret):
    """What the kernel makes of a case's data."""
    return run(name, kernel, interpret, data(name).arguments)


def check(actual, expected, dtype):
    out, m, l = actual  # noqa: E741
    wanted_out, wanted_m, wanted_l = expected
    seen = np.asarray(wanted_l) > 0
    assert np.all(np.asarray(l)[~seen] == 0)
    assert np.all(np.asarray(out)[~seen] == 0)
    normalised, wanted = (
        np.asarray(o)[seen] / np.asarray(n)[seen][:, None] for o, n in ((out, l), (wanted_out, wanted_l))
    )
    assert rms_error_ratio(normalised, wanted) < TOLERANCE[jnp.dtype(dtype)]
    # m may be any score that is large enough; with l it says the same
    one, other = (np.asarray(m)[seen] + np.log(np.asarray(l)[seen]) for m, l in ((m, l), (wanted_m, wanted_l)))  # noqa: E741
    # weights may be rounded in l; with a mean, the operands of two products are
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1.5 * TOLERANCE[jnp.dtype(dtype)])


@pytest.mark.parametrize(
    ("name", "kernel", "interpret"),
    runs_of(
        [*(name for name in CASES if name not in FURTHER), *exhaustive(*FURTHER)], lambda name: CASES[name].by_triton
    ),
)
def test_agrees_with_dense_attention(name, kernel, interpret):
    """Also that what a sequence does not see has no effect."""
    arguments, _, expected = data(name)
    actual = answer(name, kernel, interpret)
    check(actual, expected, CASES[name].dtype)
    if not interpret:
        for one, other in zip(actual, run(name, kernel, interpret, arguments), strict=True):
            np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize(("kernel", "interpret"), FEW_RUNS)
def test_a_large_mean_overflows_no_float16(kernel, interpret):
    """A channel's product of query and mean is beyond 65504; the score of a token far above those of the others."""
    query, mean_key = (jnp.zeros((1, 1, 1, 64), dtype).at[..., 0].set(300) for dtype in (F16, jnp.float32))
    mean = Mean(mean_key[:, :, 0], rope_frequencies(64), 4)
    (key, dense_key), (value, dense_value) = (
        rows_of(np.random.default_rng(seed), (1, 1, 32, 64), F16, 0.7) for seed in (1, 2)
    )
    first, last = jnp.zeros(1, jnp.int32), jnp.full(1, 32, jnp.int32)
    options = {"scale": 64**-0.5, "mean": mean, "params": kernel.params(1), "interpret": interpret}
    parts = jit(functools.partial(kernel.module.attend_rows, **options), interpret=interpret)(
        query, key, value, first, last
    )
    actual = merge_splits(query, *parts)
    expected = attend(query, with_mean(dense_key, mean), dense_value, first, last, options["scale"])
    normalised, wanted = (out / total[..., None] for out, _, total in (actual, expected))
    assert rms_error_ratio(normalised, wanted) < TOLERANCE[jnp.dtype(F16)]


@pytest.mark.parametrize(
    ("name", "kernel", "interpret"),
    runs_of(
        ["4 bits, turned and centred", *exhaustive("centred", "dense values", "two KV heads")],
        lambda name: CASES[name].by_triton,
    ),
)
def test_a_sequence_does_not_depend_on_the_others(name, kernel, interpret):
    """Not a bit of it, though the others see nothing of a batch that they shared with it."""
    query, key, value, first, last = data(name).arguments
    chosen = 1
    alone = np.arange(len(first)) != chosen
    others = jnp.where(alone, 0, last)
    key, value = (poison(x, np.broadcast_to(alone[:, None], outside(x, first, last).shape)) for x in (key, value))
    whole, changed = answer(name, kernel, interpret), run(name, kernel, interpret, (query, key, value, first, others))
    for one, other in zip(whole, changed, strict=True):
        np.testing.assert_array_equal(bits(one)[chosen], bits(other)[chosen])


def power_of_two(rng, shape, least, most):
    return np.exp2(rng.integers(least, most, shape)).astype(np.float32)


SIZES = {  # exponents of keys' row scales, of values', of queries: least and most
    "values of all sizes": ((-2, 0), (-60, 60), (0, 1)),
    "large values": ((-2, 0), (90, 115), (0, 1)),
    "small values": ((-2, 0), (-92, -70), (0, 1)),
    "keys of all sizes": ((-30, 3), (-2, 2), (0, 1)),
    "large keys, small queries": ((98, 101), (-2, 2), (-101, -98)),
    "small keys, large queries": ((-101, -98), (-2, 2), (98, 101)),
}


@pytest.mark.parametrize(("kernel", "interpret"), FEW_RUNS)
@pytest.mark.parametrize("turned", [True, *exhaustive(False)])
def test_codes_of_any_size(turned, kernel, interpret):
    """Nothing leaves float16's range, whatever row scales and queries a bfloat16 cache holds; a sequence a case."""
    rng, head_dim, rows = np.random.default_rng(6), 64, 96
    shape = (len(SIZES), 1, rows, head_dim)
    keys, values, queries = (np.array(x)[:, :, None] for x in zip(*SIZES.values(), strict=True))
    query = jnp.asarray(
        rng.standard_normal((len(SIZES), 1, 3, head_dim)) * power_of_two(rng, (len(SIZES), 1, 3, 1), *powers(queries)),
        BF16,
    )
    (key, _), (value, _) = (coded_rows(rng, shape, BF16, 4, pairs) for pairs in ("channels", "tokens"))
    key, value = (
        dataclasses.replace(x, scale=jnp.asarray(power_of_two(rng, shape[:3], *powers(of_rows)), BF16))
        for x, of_rows in ((key, keys), (value, values))
    )
    first, last = jnp.zeros(len(SIZES), jnp.int32), jnp.full(len(SIZES), rows - 5)
    options = {"scale": head_dim**-0.5, "turned_keys": turned, "params": kernel.params(1), "interpret": interpret}
    parts = jit(functools.partial(kernel.module.attend_rows, **options), interpret=interpret)(
        query, key, value, first, last
    )
    out, _, total = merge_splits(query, *parts)
    restored_key = jax.jit(functools.partial(restored, turned=turned))(key)
    wanted_out, _, wanted_total = attend(query, restored_key, value.to_array(), first, last, options["scale"])
    actual, wanted = (np.asarray(x, np.float64) / y[..., None] for x, y in ((out, total), (wanted_out, wanted_total)))
    for sequence, name in enumerate(SIZES):
        assert rms_error_ratio(actual[sequence], wanted[sequence]) < TOLERANCE[jnp.dtype(BF16)], name


def powers(of_sequences):
    least, most = of_sequences[:, 0, :, None], of_sequences[:, 1, :, None]
    return least, most


@pytest.mark.parametrize(("kernel", "interpret"), FEW_RUNS)
def test_rows_of_zeros(kernel, interpret):
    """One sequence's values are all zero, half of the other's are; so are half of all keys."""
    rng, shape = np.random.default_rng(8), (2, 1, 64, 64)
    (key, _), (value, _) = (coded_rows(rng, shape, F16, 4, pairs) for pairs in ("channels", "tokens"))
    zero = rng.random(shape[:3]) < np.array([1.0, 0.5])[:, None, None]
    key, value = (
        dataclasses.replace(x, scale=jnp.where(none, 0, x.scale)) for x, none in ((key, zero[::-1]), (value, zero))
    )
    query, first, last = jnp.asarray(rng.standard_normal((2, 1, 3, 64)), F16), jnp.zeros(2, int), jnp.full(2, 64)
    options = {"scale": 64**-0.5, "params": kernel.params(1), "interpret": interpret}
    parts = jit(functools.partial(kernel.module.attend_rows, **options), interpret=interpret)(
        query, key, value, first, last
    )
    out, _, total = merge_splits(query, *parts)
    wanted, _, wanted_total = attend(query, key.to_array(), value.to_array(), first, last, options["scale"])
    np.testing.assert_allclose(out / total[..., None], wanted / wanted_total[..., None], atol=1e-3)


@functools.cache
def attention_on_codes(kernel, interpret):
    """Of a query [B, 1, G, H] on 64 packed rows of each sequence and 20 recent tokens."""

    def call(query, key, value, tail_key, tail_value):
        tail, packed = Tail(tail_key, tail_value, 0), jnp.full(len(query), 64)
        operands = PackedAttention(
            query, key, value, tail, packed + 20, packed, None, scale=0.1, window=None, turned_values=True
        )
        return kernel.module.decode_attention(operands, interpret=interpret)

    return jit(call, interpret=interpret)


@pytest.mark.parametrize(("kernel", "interpret"), FEW_RUNS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_row_that_is_not_finite_makes_its_sequence_so_and_no_other(side, kernel, interpret):
    rng = np.random.default_rng(7)
    coded = {
        name: coded_rows(rng, (2, 1, 64, 64), F16, 4, pairs)[0]
        for name, pairs in (("key", "channels"), ("value", "tokens"))
    }
    query = jnp.asarray(rng.standard_normal((2, 1, 4, 64)), F16)
    tail = [jnp.asarray(rng.standard_normal((2, 1, 32, 64)), F16) for _ in range(2)]
    coded[side] = dataclasses.replace(coded[side], scale=coded[side].scale.at[0, 0, 37].set(jnp.nan))
    out = np.asarray(attention_on_codes(kernel, interpret)(query, coded["key"], coded["value"], *tail), np.float32)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


CACHES = {  # config, capacity, lengths, window
    "recommended": (mj.CompressionConfig.recommended(0.7, 0.5), 1000, [1000, 63], None),
    "window": (mj.CompressionConfig(0.5, 0.7, residual_length=100, group=64, sink_tokens=3), 384, [301, 167], 250),
    "dense keys": (mj.CompressionConfig.recommended(0, 0.7), 160, [160, 1], 100),
    "too short to pack": (mj.CompressionConfig(), 40, [40, 0], None),
    "fast": (mj.CompressionConfig.preset("fast"), 300, [300, 63], None),
    "balanced, window": (mj.CompressionConfig.preset("balanced"), 300, [300, 101], 200),
    "small": (mj.CompressionConfig.preset("small"), 300, [300, 63], None),
    "pruned keys, values in 2 bits": (
        mj.CompressionConfig.recommended(0.7, 0, v_bits=2, rotate_values=True), 200, [200, 63], None,
    ),
}  # fmt: skip


def triton_attends(name):
    """Codes on both sides, none of them pruned, or on neither."""
    config = CACHES[name][0]
    return config.v_bits == 16 or (config.k_bits < 16 and config.k_sparsity == 0)


@functools.cache
def filled_cache(name):
    """A cache, queries for it, and what XLA answers."""
    config, capacity, lengths, window = CACHES[name]
    rng = np.random.default_rng(4)
    key, value = (jnp.asarray(rng.standard_normal((2, capacity, 1, 64)) + 1, F16) for _ in range(2))
    asked = jnp.asarray(rng.standard_normal((2, capacity, 3, 64)), F16)  # by the prompt
    query = jnp.asarray(rng.standard_normal((2, 3, 64)), F16)
    frequencies = rope_frequencies(64)

    def fill(key, value, lengths, query):
        cache = mj.LayerCache.init(
            config, batch=2, capacity=capacity, num_kv_heads=1, head_dim=64, dtype=F16, inv_freq=frequencies
        )
        cache = mj.prefill(cache, key, value, lengths, query=asked, implementation="xla")
        return cache, mj.decode_attention(query, cache, sliding_window=window, implementation="xla")

    cache, expected = jit(fill, interpret=True)(key, value, jnp.array(lengths), query)
    return cache, query, expected


FEW_CACHES = ("recommended", "too short to pack", "fast")


@pytest.mark.parametrize(
    ("name", "kernel", "interpret"),
    runs_of([*FEW_CACHES, *exhaustive(*(name for name in CACHES if name not in FEW_CACHES))], triton_attends),
)
def test_attends_a_cache_as_xla_does(name, kernel, interpret):
    cache, query, expected = filled_cache(name)
    *_, lengths, window = CACHES[name]

    # not by `mj.decode_attention`, which is jitted: both values of `interpret` would share one trace
    def attend_cache(query, cache):
        return kernel.backend.attend(decode_operands(query, cache, 64**-0.5, window), interpret=interpret)

    actual = jit(attend_cache, interpret=interpret)(query[:, None], cache)[:, 0]
    some = np.asarray(lengths) > 0
    assert np.all(np.asarray(actual)[~some] == 0)
    assert rms_error_ratio(actual[some], expected[some]) < TOLERANCE[jnp.dtype(F16)]


@pytest.mark.parametrize(("name", "kernel", "interpret"), runs_of(["fast", *exhaustive("small")], triton_attends))
def test_several_new_tokens_see_what_is_held(name, kernel, interpret):
    """As XLA has them, with the log-sum-exp of their scores; more queries than a kernel takes at once, and no token."""
    cache, *_ = filled_cache(name)
    cache = dataclasses.replace(cache, lengths=jnp.array([0, CACHES[name][2][0]], jnp.int32))
    query = jnp.asarray(np.random.default_rng(6).standard_normal((2, 1, 7 * 3, 64)), F16)

    def attend_with(attend, query, cache):
        return attend(decode_operands(query, cache, 64**-0.5, None, return_lse=True, new=7))

    by_kernel = functools.partial(attend_with, functools.partial(kernel.backend.attend, interpret=interpret))
    out, lse = map(np.asarray, jit(by_kernel, interpret=interpret)(query, cache))
    expected, wanted = map(np.asarray, jit(functools.partial(attend_with, attend_packed), interpret=True)(query, cache))
    assert rms_error_ratio(out[1], expected[1]) < TOLERANCE[jnp.dtype(F16)]
    np.testing.assert_allclose(lse[1], wanted[1], atol=2e-3)
    assert (out[0] == 0).all()
    assert np.isneginf(lse[0]).all()
    assert np.isneginf(wanted[0]).all()


SLOTS = {"dense": lambda _: 0, "in eights": lambda h: h // 4 + 8, "in fours": lambda h: h // 4 + 4, "all": lambda h: h}
CODES = {f"{bits} bits": lambda _, bits=bits: str(bits) for bits in (8, 4, 2)}
PRUNED_CODES = {"pruned in 4 bits": lambda h: (h // 4 + 4, 4)}
AXES = {
    "k_slots": [*SLOTS],
    "v_slots": [*SLOTS],
    "rows": [0, 32, 160, 4096],
    "sinks": [0, 4],
    "head_dim": [64, 128],
    "dtype": [BF16, F16],
    "window": [None, 90],
    "centred": [False, True],
    "splits": [None, 1, 70],
}
LOWERED = [{**case, "group": 1 + i % 16} for i, case in enumerate(pairwise(AXES))]
CODED_AXES = AXES | {
    "k_slots": ["in eights", "dense", *CODES, *PRUNED_CODES],
    "v_slots": ["in eights", "dense", *CODES],
    "turned": [False, True],
    "teams": [1, 3],
}


def without_codes(case):
    return not {case.get("k_slots", "4 bits"), case.get("v_slots", "4 bits")} & {*CODES, *PRUNED_CODES}


LOWERED_FOR_TRITON = [
    {**case, "group": 1 + 3 * i % 16}
    for i, case in enumerate(
        pairwise(
            {axis: values for axis, values in CODED_AXES.items() if axis != "teams"}
            | {"k_slots": [*CODES], "v_slots": [*CODES], "rows": [32, 4096], "splits": [None]}
        )
    )
]
LOWERED_CODES = [{**case, "group": 1 + i % 16} for i, case in enumerate(pairwise(CODED_AXES, without=without_codes))]


def abstract_call(
    kernel, *, k_slots, v_slots, rows, sinks, head_dim, dtype, window, centred, splits, group, turned=False, teams=None
):
    """(decode attention as a function of arrays, their shapes); sinks and recent tokens beside the packed rows."""
    k_slots, v_slots = ((SLOTS | CODES | PRUNED_CODES)[slots](head_dim) for slots in (k_slots, v_slots))
    query, key, value = specs(2, 2, group, rows, head_dim, k_slots, v_slots, dtype)
    dense = jax.ShapeDtypeStruct((2, 2, 64 + sinks, head_dim), dtype)
    mean = jax.ShapeDtypeStruct((2, 2, head_dim), jnp.float32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = None if splits is None else kernel.params(splits, **{"teams": teams} if teams else {})

    def call(query, key, value, dense, mean, lengths):
        tail, mean = Tail(dense, dense, sinks), Mean(mean, rope_frequencies(head_dim), sinks) if centred else None
        flags = {"scale": 0.1, "window": window, "turned_keys": turned, "turned_values": turned}
        flags["return_lse"] = sinks > 0
        operands = PackedAttention(query, key, value, tail, lengths, lengths, mean, **flags)
        return kernel.module.decode_attention(operands, params=params)

    return call, (query, key, value, dense, mean, lengths)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("case", [*LOWERED[:4], *exhaustive(*LOWERED[4:])], ids=describe)
def test_lowers_for_cuda(case, kernel):
    """Any two choices occur together, and every number of query heads."""
    if kernel.name == "mosaic_gpu" and case["k_slots"] == case["v_slots"] == "dense":
        pytest.skip("one side must be packed")
    call, arguments = abstract_call(kernel, **case)
    text = lower_for_cuda(call, *arguments)
    assert kernel.name in text
    assert not any(other.name in text for other in KERNELS if other != kernel)


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(kernel, case, id=f"{kernel.name} {describe(case)}", marks=marks)
        for kernel, cases, marks in (
            (MOSAIC, LOWERED_CODES[:4], ()),
            (MOSAIC, LOWERED_CODES[4:], pytest.mark.exhaustive),
            (TRITON, LOWERED_FOR_TRITON[:2], ()),
            (TRITON, LOWERED_FOR_TRITON[2:], pytest.mark.exhaustive),
        )
        for case in cases
    ],
)
def test_codes_lower_for_cuda(kernel, case):
    call, arguments = abstract_call(kernel, **case)
    assert kernel.name in lower_for_cuda(call, *arguments)


def test_triton_says_which_codes_it_cannot_take():
    """Those behind a bitmap, and those of one side alone."""
    case = {"rows": 64, "sinks": 0, "head_dim": 64, "dtype": BF16, "window": None, "centred": False, "splits": 1}
    for slots, message in (
        (("pruned in 4 bits", "2 bits"), "codes of .* behind a bitmap|signs and magnitudes"),
        (
            ("4 bits", "in eights"),
            "both keys and values in codes, or neither; got keys of codes of 4 bits and values of",
        ),
        (("dense", "4 bits"), "both keys and values in codes, or neither"),
    ):
        call, arguments = abstract_call(TRITON, k_slots=slots[0], v_slots=slots[1], group=1, **case)
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(call, *arguments)


@pytest.mark.parametrize("name", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("config", [mj.CompressionConfig(), mj.CompressionConfig.recommended(0.5, 0)])
def test_attention_on_a_cache_lowers_for_cuda(config, name):
    def attend_cache(query):
        cache = mj.LayerCache.init(
            config, batch=2, capacity=256, num_kv_heads=2, head_dim=64, dtype=F16, inv_freq=rope_frequencies(64)
        )
        return mj.decode_attention(query, cache, sliding_window=100, implementation=name)

    assert name in lower_for_cuda(attend_cache, jax.ShapeDtypeStruct((2, 8, 64), F16))


@pytest.mark.parametrize("group", [1, 8])
def test_wide_blocks_lower_for_cuda(group):
    kernel = Kernel("mosaic_gpu", mosaic_decode_attention, functools.partial(MosaicParams, warps=12), mosaic_backend)
    call, arguments = abstract_call(
        kernel, k_slots="in eights", v_slots="in eights", rows=4096, sinks=4, head_dim=128, dtype=BF16, window=None,
        centred=True, splits=2, group=group,
    )  # fmt: skip
    assert "mosaic_gpu" in lower_for_cuda(call, *arguments)


def abstract_rows(batch, kv_heads, group, rows, head_dim, dtype):
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return *specs(batch, kv_heads, group, rows, head_dim, 20, 20, dtype), lengths, lengths


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1, 64, 128, jnp.float32), "float32"),
        ((1, 1, 1, 64, 96, BF16), "head_dim=96"),
        ((1, 1, 17, 64, 128, BF16), "16 query heads"),
    ],
)
def test_says_what_it_cannot_run(sizes, message, kernel):
    query, key, value, lengths, _ = abstract_rows(*sizes)
    tail = Tail(query, query, 0)

    def call(query, key, value, tail_key, tail_value, lengths):
        tail = Tail(tail_key, tail_value, 0)
        operands = PackedAttention(query, key, value, tail, lengths, lengths, None, scale=0.1, window=None)
        return kernel.module.decode_attention(operands)

    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, query, key, value, tail.key, tail.value, lengths)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_refuses_to_lower_for_the_cpu(kernel):
    call = jax.jit(functools.partial(kernel.module.attend_rows, scale=0.1))
    traced = call.trace(*abstract_rows(1, 1, 1, 64, 128, BF16))
    with pytest.raises(NotImplementedError, match="lower for CUDA alone; implementation=None or 'xla' runs here"):
        traced.lower(lowering_platforms=("cpu",))


def test_a_sequence_of_names_passes_over_what_needs_a_gpu():
    cache = mj.LayerCache.init(mj.CompressionConfig(), batch=1, capacity=96, num_kv_heads=1, head_dim=64, dtype=F16)
    query = jnp.ones((1, 1, 64), F16)
    out = mj.decode_attention(query, cache, implementation=("mosaic_gpu", "triton", "xla"))
    np.testing.assert_array_equal(out, jnp.zeros_like(query))
