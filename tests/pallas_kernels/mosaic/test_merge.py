"""The merge through Mosaic GPU against plain attention in float32."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.operands import Tail
from mustafar_jax.pallas_kernels import launch
from mustafar_jax.pallas_kernels.mosaic.merge import merge
from mustafar_jax.pallas_kernels.mosaic.merge_plan import queries_per_block
from mustafar_jax.rotation import turn_back
from tests.pallas_kernels.data import WHERE, everywhere, float32
from tests.pallas_kernels.lowering import describe, lower_for_cuda, pairwise

BF16, F16 = jnp.bfloat16, jnp.float16
ROUNDING = {BF16: 2**-8, F16: 2**-11}
"""Two roundings of a result."""
LOWEST = np.finfo(np.float32).min


class Case(NamedTuple):
    """One compilation. With one multiprocessor a block takes all the query heads that it can, with many only one."""

    head_dim: int
    dtype: Any
    group: int
    splits: int
    sinks: int
    ring: int
    window: int | None = None
    cores: int = 1
    kv_heads: int = 1
    turned: bool = False


CASES = {
    "one query head": Case(128, BF16, 1, 3, 4, 64, kv_heads=2),
    "no splits": Case(64, F16, 2, 0, 0, 64),
    "a block per query head": Case(128, F16, 4, 5, 4, 64, cores=1000, kv_heads=2),
    "4 query heads, many splits": Case(128, F16, 4, 17, 4, 64),
    "5 query heads": Case(64, BF16, 5, 9, 4, 32),
    "6 query heads": Case(128, F16, 6, 2, 3, 96),
    "16 query heads": Case(64, F16, 16, 3, 4, 64),
    "130 splits": Case(128, BF16, 1, 130, 4, 64, cores=1000),
    "more than 8 tiles": Case(64, F16, 1, 10, 4, 128),
    "more than 16 tiles": Case(128, BF16, 8, 1, 4, 320),
    "a window within the ring": Case(128, F16, 3, 2, 4, 64, window=20),
    "a window with sinks": Case(64, BF16, 2, 2, 4, 64, window=66),
    "a window of all": Case(64, F16, 1, 0, 4, 64, window=2**31 - 1),
    "turned": Case(128, BF16, 4, 9, 4, 64, turned=True),
    "turned, 3 query heads": Case(64, F16, 3, 2, 4, 64, turned=True),
    "turned, no splits": Case(64, F16, 2, 0, 4, 64, turned=True),
}


FEW = ("no splits", "5 query heads", "more than 8 tiles", "a window with sinks", "turned")


def sequences(case):
    """(length, packed rows) of each: none, not all sinks, a full ring, one that has turned, one just emptied."""
    whole = case.sinks + case.ring
    return [(0, 0), (2, 0), (whole, 0), (whole + 160 - case.ring // 2, 160), (case.sinks + 33, 32)]


def random_splits(rng, case, heads):
    """Out, m and l of splits; those of the first sequence, and some others, are of no tokens."""
    shape = (heads, case.splits, case.group)
    empty = rng.random(shape) < 0.2
    empty[: case.kv_heads] = True
    out = np.where(empty[..., None], 0, rng.standard_normal((*shape, case.head_dim)))
    m = np.where(empty, rng.choice([-np.inf, LOWEST], shape), 3 * rng.standard_normal(shape))
    l = np.where(empty, 0, rng.uniform(0.5, 20, shape))  # noqa: E741
    return [x.astype(np.float32) for x in (out, m, l)]


def tokens(case, length, packed):
    """[(position, slot)] of the dense tokens that are visible."""
    recent = range(case.sinks + packed, length)
    slots = [(p, p) for p in range(min(length, case.sinks))]
    slots += [(p, case.sinks + (p - case.sinks) % case.ring) for p in recent]
    return [(p, slot) for p, slot in slots if case.window is None or p >= length - case.window]


def attend(query, key, value, splits, seen, scale):
    """Of one sequence and KV head: query [G, H], key and value [slots, H], splits out [splits, G, H], m and l."""
    out, m, l = splits  # noqa: E741
    scores = query @ key[seen].T * scale
    largest = np.max(np.concatenate([scores, m.T], axis=1), axis=1, initial=LOWEST)[:, None]
    weights, decay = np.exp(scores - largest), np.exp(m - largest.T)
    total = weights.sum(axis=1) + (l * decay).sum(axis=0)
    sums = weights @ value[seen] + (out * decay[..., None]).sum(axis=0)
    return sums / np.where(total > 0, total, 1)[:, None]


@pytest.mark.parametrize(("name", "interpret"), everywhere(CASES, FEW))
def test_agrees_with_plain_attention(name, interpret, monkeypatch):
    """Also that slots that hold no visible token have no effect, and that nothing visible gives zeros."""
    case, rng = CASES[name], np.random.default_rng(zlib.crc32(name.encode()))
    monkeypatch.setattr(launch, "cores", lambda: case.cores)
    batch, slots, scale = len(sequences(case)), case.sinks + case.ring, case.head_dim**-0.5
    query = jnp.asarray(rng.standard_normal((batch, case.kv_heads, case.group, case.head_dim)), case.dtype)
    key, value = (rng.standard_normal((batch, case.kv_heads, slots, case.head_dim)) for _ in range(2))
    splits = random_splits(rng, case, batch * case.kv_heads)
    seen = [[slot for _, slot in tokens(case, *sequence)] for sequence in sequences(case)]
    for b in range(batch):
        for x in (key, value):
            x[b, :, np.setdiff1d(np.arange(slots), seen[b])] = np.nan
    key, value = (jnp.asarray(x, case.dtype) for x in (key, value))
    lengths, packed = (jnp.array(x, jnp.int32) for x in zip(*sequences(case), strict=True))

    def call(query, key, value, splits, lengths, packed):
        options = {"scale": scale, "window": case.window, "turned": case.turned, "interpret": interpret}
        return merge(query, splits, Tail(key, value, case.sinks), lengths, packed, **options)

    given = [jnp.asarray(x) for x in splits] if case.splits else []
    actual = jax.jit(call)(query, key, value, given, lengths, packed)
    assert actual.dtype == case.dtype
    actual, query, key, value = (np.asarray(x) for x in float32(actual, query, key, value))
    if case.turned and case.splits:
        splits[0] = np.asarray(turn_back(splits[0]))
    for b, k in np.ndindex(batch, case.kv_heads):
        of_head = [x[b * case.kv_heads + k] for x in splits]
        expected = attend(query[b, k], key[b, k], value[b, k], of_head, seen[b], scale)
        np.testing.assert_allclose(actual[b, k], expected, rtol=ROUNDING[case.dtype], atol=1e-4)
    assert np.all(actual[0] == 0)


@pytest.mark.parametrize("interpret", WHERE)
def test_weights_are_not_rounded(interpret):
    """Two weights, nearly equal, of values that cancel: as 16-bit numbers they would differ too little, or too much."""
    key = jnp.zeros((1, 1, 64, 64), BF16).at[0, 0, 1, 0].set(0.01)
    value = jnp.zeros((1, 1, 64, 64), BF16).at[0, 0, :2].set(jnp.array([1.0, -1.0], BF16)[:, None])
    query = jnp.ones((1, 1, 1, 64), BF16)
    length, packed = jnp.array([2], jnp.int32), jnp.array([0], jnp.int32)
    out = merge(query, [], Tail(key, value, 0), length, packed, scale=1.0, window=None, interpret=interpret)
    expected = -np.tanh(float(key[0, 0, 1, 0]) / 2)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=ROUNDING[BF16])


AXES = {
    "splits": [0, 1, 9, 70],
    "sinks": [0, 4],
    "ring": [64, 128, 320],
    "head_dim": [64, 128],
    "dtype": [BF16, F16],
    "window": [None, 90],
    "batch": [1, 64],
}
LOWERED = [{**case, "group": 1 + i % 16} for i, case in enumerate(pairwise(AXES))]


@pytest.mark.parametrize("case", LOWERED, ids=describe)
def test_lowers_for_cuda(case):
    """Any two choices occur together, and every number of query heads."""
    batch, group, head_dim, splits = (case[name] for name in ("batch", "group", "head_dim", "splits"))
    query = jax.ShapeDtypeStruct((batch, 2, group, head_dim), case["dtype"])
    dense = jax.ShapeDtypeStruct((batch, 2, case["sinks"] + case["ring"], head_dim), case["dtype"])
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    shapes = [(head_dim,), (), ()] if splits else []
    parts = [jax.ShapeDtypeStruct((batch * 2, splits, group, *shape), jnp.float32) for shape in shapes]

    def call(query, parts, dense, lengths):
        tail = Tail(dense, dense, case["sinks"])
        return merge(query, parts, tail, lengths, lengths, scale=0.1, window=case["window"])

    assert "mosaic_gpu" in lower_for_cuda(call, query, parts, dense, lengths)


@pytest.mark.parametrize(
    ("heads", "group", "splits", "queries"),
    [
        (256, 1, 1, 1),
        (8, 4, 32, 1),
        (64, 4, 4, 2),
        (1024, 4, 1, 4),
        (1024, 16, 1, 8),
        (1024, 11, 1, 1),
        (1024, 6, 1, 6),
    ],
)
def test_blocks_share_slots_where_there_are_enough_blocks(heads, group, splits, queries, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 132)
    assert queries_per_block(heads=heads, group=group, slots=68, splits=splits) == queries


def test_of_two_that_read_as_much_the_one_with_fewer_blocks_is_taken(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    assert queries_per_block(heads=8, group=2, slots=64, splits=0) == 2
