"""Packing to codes in one kernel, against pruning and coding through XLA."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax import rotation
from mustafar_jax.backend import Operation
from mustafar_jax.cache import packed as packed_cache
from mustafar_jax.codecs import codec_of
from mustafar_jax.layout import WORD, from_lanes
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import backend
from mustafar_jax.pallas_kernels.triton.code_pack import Code, code_pack
from mustafar_jax.pruning import magnitude_mask
from mustafar_jax.rows import RowFormat
from tests.helpers import CONFIGS, adversarial, bits, exhaustive, replace_backend, rope_frequencies
from tests.pallas_kernels.data import jit
from tests.pallas_kernels.lowering import describe, lower_for_cuda, pairwise
from tests.quick import QUICK

BF16, F16 = jnp.bfloat16, jnp.float16
FIRST, START, HELD, ROWS = np.array([4, 8, 0]), np.array([0, 32, 96]), np.array([64, 32, 64]), 64


class Case(NamedTuple):
    """What is coded, and how."""

    bits: int
    head_dim: int = 128
    dtype: type = BF16
    pairs: str = "channels"
    slots: int | None = None
    turn: bool = True
    centred: bool = False
    weighed: bool = False
    head_axis: int = 2

    @property
    def form(self):
        codec = codec_of("bits", self.bits, pruned=self.slots is not None)
        return RowFormat(self.head_dim, np.dtype(self.dtype), self.slots, codec, self.pairs)


CASES = {
    "values in 2 bits": Case(2, 64, F16, "tokens", head_axis=1),
    "keys pruned, centred and weighed": Case(4, 64, slots=24, turn=False, centred=True, weighed=True),
}
MORE = {
    "keys in 4 bits": Case(4),
    "keys in 4 bits, centred": Case(4, centred=True),
    "keys in 4 bits, narrow": Case(4, 64, F16, centred=True),
    "values in 4 bits": Case(4, pairs="tokens"),
    "values in 2 bits, wide": Case(2, pairs="tokens"),
    "values in 3 bits": Case(3, pairs="tokens"),
    "values in 3 bits, narrow": Case(3, 64, pairs="tokens"),
    "8 bits, not turned": Case(8, turn=False, centred=True, dtype=F16),
    "4 bits, not turned": Case(4, turn=False),
    "keys pruned": Case(4, slots=40, turn=False),
    "keys pruned, centred and weighed, wide": Case(4, slots=40, turn=False, centred=True, weighed=True),
    "values pruned in 8 bits": Case(8, slots=20, turn=False, dtype=F16, pairs="tokens"),
}
EVERYWHERE = [
    *(pytest.param(case, True, id=f"interpret-{name}") for name, case in CASES.items()),
    *(pytest.param(case, True, id=f"interpret-{name}", marks=pytest.mark.exhaustive) for name, case in MORE.items()),
    *(pytest.param(case, False, id=f"device-{name}", marks=pytest.mark.gpu) for name, case in (CASES | MORE).items()),
]


def data(rng, shape, dtype, *, turned):
    """[B, K, S, H]: random, of very unequal channels, of any bits, zeros, with ties, and too large to turn.

    What is to be turned has no ties: turned, they would cancel to zeros, which lie between two levels.
    """
    x = rng.standard_normal(shape)
    x[0] *= np.exp(2 * rng.standard_normal(shape[-1]))
    x = jnp.asarray(x, dtype).at[:, :, 20:30].set(adversarial(rng, (10, shape[-1]), dtype))
    x = x.at[:, :, 31].set(0)
    x = x if turned else x.at[:, :, 33:40].set(jnp.round(x[:, :, 33:40]))
    return x.at[:, :, 41, 3].set(jnp.finfo(dtype).max).at[:, :, 42, 5].set(jnp.nan)


def poisoned(rng, form, batch, kv_heads, length):
    """Rows of any bits."""
    rows = jax.eval_shape(lambda: form.empty((batch, kv_heads), length))
    words = {
        name: jnp.asarray(rng.integers(0, 2**32, x.shape, dtype=np.uint32))
        for name, x in (("payload", rows.payload), ("bitmap", rows.bitmap))
        if x is not None
    }
    scale = adversarial(rng, rows.scale.shape, BF16)
    overflow = None if rows.overflow is None else jnp.zeros(rows.overflow.shape, bool)
    return dataclasses.replace(rows, scale=scale, overflow=overflow, **words)


def of_xla(case, x, mean, weight):
    """The rows of what leaves, through XLA; [B, K, ROWS, H]."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(x):
        taken = jnp.stack([x[b, :, at : at + ROWS] for b, at in enumerate(FIRST)]).astype(jnp.float32)
        if mean is not None:
            taken -= mean.at(mean.offset + START[:, None] + np.arange(ROWS))
        if case.slots is None:
            return case.form.pack(rotation.turn(taken) if case.turn else taken)
        weighed = taken if weight is None else taken * weight[:, :, None]
        mask = magnitude_mask(weighed.astype(case.dtype), 1 - case.slots / case.head_dim)
        return case.form.pack(taken, mask, None if weight is None else weight[:, :, None])

    return run(x)


@pytest.mark.parametrize(("case", "interpret"), EVERYWHERE)
def test_agrees_with_xla(case, interpret):
    """Masks and rows that are not finite exactly, scales within a rounding, codes but for one in a thousand."""
    rng, (batch, kv_heads, length) = np.random.default_rng(1), (3, 2, 96)
    x = data(rng, (batch, kv_heads, 76, case.head_dim), case.dtype, turned=case.turn)
    key = jnp.asarray(rng.standard_normal((batch, kv_heads, case.head_dim)), jnp.float32)
    mean = Mean(key, rope_frequencies(case.head_dim), 4) if case.centred else None
    weight = jnp.asarray(rng.uniform(0.1, 1, key.shape), jnp.float32) if case.weighed else None
    target = poisoned(rng, case.form, batch, kv_heads, length)

    @functools.partial(jit, interpret=interpret)
    def run(x, target):
        code = Code(x if case.head_axis == 1 else x.swapaxes(1, 2), target, case.slots or 0, mean, weight, case.turn)
        ranges = (jnp.asarray(x, jnp.int32) for x in (FIRST, START, HELD))
        [rows] = code_pack([code], *ranges, rows=ROWS, head_axis=case.head_axis, interpret=interpret)
        return rows

    actual, wanted = run(x, target), of_xla(case, x, mean, weight)
    for b, (start, held) in enumerate(zip(START, HELD, strict=True)):
        one = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], actual)
        before = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], target)
        here = held if start < length else 0
        agree(one.take(start, here), jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], wanted).take(0, here))
        unchanged(one.take(0, start), before.take(0, start))
        written = start + (here if case.slots is None or not here else ROWS)
        unchanged(one.take(written, length - written), before.take(written, length - written))
        if written > start + here:
            behind = one.take(start + here, ROWS - here)
            assert not any(np.asarray(x).any() for x in (behind.bitmap, behind.payload, behind.scale))


def agree(actual, wanted):
    """See `test_agrees_with_xla`."""
    if wanted.bitmap is not None:
        np.testing.assert_array_equal(actual.bitmap, wanted.bitmap)
    one, other = (np.asarray(from_lanes(rows.scale).astype(jnp.float32)) for rows in (actual, wanted))
    finite = np.isfinite(other)
    np.testing.assert_array_equal(np.isfinite(one), finite)
    assert np.isnan(one[~finite]).all()
    np.testing.assert_allclose(one[finite], other[finite], rtol=2**-7)
    codes, expected = (np.asarray(rows.format._rearrange(rows.payload))[finite] for rows in (actual, wanted))
    assert (codes != expected).sum() <= codes.size / 1000


def unchanged(actual, before):
    for name in ("bitmap", "payload", "scale"):
        if getattr(before, name) is not None:
            one, other = (getattr(rows, name) for rows in (actual, before))
            np.testing.assert_array_equal(*(bits(x) if name == "scale" else x for x in (one, other)))


FILLED = [
    pytest.param("balanced", True, id="interpret-balanced", marks=pytest.mark.exhaustive),
    pytest.param("small", True, id="interpret-small", marks=pytest.mark.exhaustive),  # tiles of 8 tokens, and of 16
    *(
        pytest.param(name, False, id=f"device-{name}", marks=pytest.mark.gpu)
        for name in ("8 bits", "fast", "balanced", "small", "3 bits")
    ),
]


@pytest.mark.parametrize(("name", "interpret"), FILLED)
def test_fills_a_cache_as_xla_does(name, interpret, monkeypatch):
    """In prefill and while tokens are appended; sequences fill their groups at different steps."""
    replace_backend(monkeypatch, "triton", pack=Operation(functools.partial(backend.pack, interpret=interpret)))
    # it is jitted by itself, where both values of `interpret` could share one trace
    monkeypatch.setattr(packed_cache, "_pack_leaving", packed_cache._pack_leaving.__wrapped__)
    rng = np.random.default_rng(9)
    key, value = (jnp.asarray(rng.standard_normal((3, 160, 1, 64)), F16) for _ in range(2))
    query = jnp.asarray(rng.standard_normal((3, 100, 2, 64)), F16)
    lengths, dense = jnp.array([1, 63, 100]), []
    for implementation in ("triton", "xla"):
        fill = jit(functools.partial(mj.prefill, implementation=implementation), interpret=interpret)
        append = jit(functools.partial(mj.append, implementation=implementation), interpret=interpret, donate_argnums=0)
        sizes = {"batch": 3, "capacity": 200, "num_kv_heads": 1, "head_dim": 64, "dtype": F16}
        held = mj.LayerCache.init(CONFIGS[name], inv_freq=rope_frequencies(64), **sizes)
        held = fill(held, key[:, :100], value[:, :100], lengths, query=query)
        for step in range(100, 160):
            given = {"query": query[:, step - 100]} if CONFIGS[name].weigh_keys else {}
            held = append(held, key[:, step], value[:, step], **given)
        dense.append([np.asarray(x, np.float32) for x in held.to_dense()[:2]])
    for one, other in zip(*dense, strict=True):
        for b, length in enumerate(np.asarray(lengths) + 60):
            here, there = one[b, :length], other[b, :length]
            assert np.isfinite(here).all()
            assert (np.abs(here - there) > 0.02).mean() < 2e-3


AXES = {
    "what": ["8 bits", "4 bits", "2 bits", "4 bits behind a bitmap"],
    "head_dim": [64, 128],
    "dtype": [BF16, F16],
    "head_axis": [1, 2],
    "centred": [False, True],
    "turn": [False, True],
    "weighed": [False, True],
    "pairs": ["channels", "tokens"],
}


def lowered(case):
    """The text of a case, lowered for CUDA."""
    shape = (2, 128, 4, case.head_dim) if case.head_axis == 2 else (2, 4, 128, case.head_dim)
    source, key = jax.ShapeDtypeStruct(shape, case.dtype), jax.ShapeDtypeStruct((2, 4, case.head_dim), jnp.float32)
    target = jax.eval_shape(lambda: case.form.empty((2, 4), 128))

    def call(source, target, key, ranges):
        mean = Mean(key, rope_frequencies(case.head_dim), 4) if case.centred else None
        code = Code(source, target, case.slots or 0, mean, key if case.weighed else None, case.turn)
        return code_pack([code], *ranges, rows=64, head_axis=case.head_axis)

    return lower_for_cuda(call, source, target, key, [jax.ShapeDtypeStruct((2,), jnp.int32)] * 3)


@pytest.mark.parametrize("case", [*CASES.values(), *exhaustive(*((case,) for case in MORE.values()))])
def test_lowers_for_cuda(case):
    assert "code_pack" in lowered(case)


@pytest.mark.parametrize("case", exhaustive(*((case,) for case in pairwise(AXES))), ids=describe)
def test_lowers_whatever_is_chosen(case):
    """Any two choices occur together."""
    fields = {name: x for name, x in case.items() if name != "what"}
    slots = case["head_dim"] // 4 + 8 if "bitmap" in case["what"] else None
    if slots:
        fields["turn"] = False
    else:
        fields["weighed"] = False
    assert "code_pack" in lowered(Case(int(case["what"][0]), slots=slots, **fields))


def test_rows_that_are_no_whole_groups_are_refused():
    target = Case(4).form.empty((1, 1), 64)
    ranges = [jnp.zeros(1, jnp.int32)] * 3
    with pytest.raises(ValueError, match="rows=48 must be a multiple of 32"):
        code_pack([Code(jnp.zeros((1, 64, 1, 128), BF16), target, 0)], *ranges, rows=48, head_axis=2, interpret=True)


def test_sources_of_two_shapes_are_refused():
    target = Case(4).form.empty((1, 1), 64)
    codes = [Code(jnp.zeros((1, length, 1, 128), BF16), target, 0) for length in (64, 65)]
    with pytest.raises(ValueError, match=r"sources are bfloat16\[1, 64, 1, 128\] and .*; wanted one shape"):
        code_pack(codes, *[jnp.zeros(1, jnp.int32)] * 3, rows=32, head_axis=2, interpret=True)


@pytest.mark.parametrize(("head_dim", "dtype", "message"), [(96, BF16, "head_dim=96"), (64, jnp.float32, "float32")])
def test_says_what_it_cannot_run(head_dim, dtype, message):
    target = Case(4, head_dim, dtype).form.empty((1, 1), WORD)
    ranges = [jnp.zeros(1, jnp.int32)] * 3
    with pytest.raises(NotImplementedError, match=message):
        code_pack([Code(jnp.zeros((1, WORD, 1, head_dim), dtype), target, 0)], *ranges, rows=WORD, head_axis=2)
