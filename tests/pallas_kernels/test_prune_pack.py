"""Prune and pack's kernel against pruning and packing through XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax import bitmap
from mustafar_jax.pallas_kernels import triton
from mustafar_jax.pallas_kernels.decode_attention import Mean
from mustafar_jax.pallas_kernels.prune_pack import Prune, prune_pack
from mustafar_jax.pallas_kernels.rows import Packed
from mustafar_jax.pruning import magnitude_bits, rescale_to_norm
from mustafar_jax.rope import rotate
from tests.helpers import adversarial, bits, rope_frequencies
from tests.pallas_kernels.data import implementations
from tests.pallas_kernels.lowering import lower_for_cuda

BF16, F16 = jnp.bfloat16, jnp.float16


def data(rng, shape, dtype, kind):
    """[B, S, K, H]: random, with many ties, of any bits, all equal, or with channels of very different scales."""
    if kind == "adversarial":
        return adversarial(rng, shape, dtype)
    x = rng.standard_normal(shape)
    if kind == "ties":
        x = x.round()
    if kind == "equal":
        x = np.sign(x)
    if kind == "skewed":
        x *= np.exp(3 * rng.standard_normal(shape[-1]))
    return jnp.asarray(x, dtype)


def poisoned(rng, batch, kv_heads, rows, head_dim, kept, dtype):
    """Packed rows of any bits."""
    empty = bitmap.empty((batch, kv_heads), rows, head_dim, kept, dtype)
    words = rng.integers(0, 2**32, empty.bitmap.shape, dtype=np.uint32)
    return Packed(jnp.asarray(words), adversarial(rng, empty.values.shape, dtype))


def as_array(packed):
    """Packed rows as the library's BitmapArray."""
    return mj.BitmapArray(*packed, jnp.zeros(packed.bitmap.shape[:2], bool), packed.bitmap.shape[2])


def written(target, x, mask, first, start, held, rows):
    """The target with rows first .. of x [B, K, S, H] in it, through XLA."""
    row = jnp.arange(rows)
    taken = jnp.minimum(jnp.asarray(first)[:, None] + row, x.shape[2] - 1)[:, None, :, None]
    entries, mask = (jnp.take_along_axis(array, taken, axis=2) for array in (bits(x), mask))
    entries = jax.lax.bitcast_convert_type(entries, x.dtype)
    kept = target.values.shape[3] * target.values.shape[5]
    packed = bitmap.pack(entries, mask & (row < jnp.asarray(held)[:, None])[:, None, :, None], slots=kept)
    whole = bitmap.put(as_array(target), packed, jnp.asarray(start))
    return Packed(whole.bitmap, whole.values)


def assert_same(actual, expected):
    np.testing.assert_array_equal(actual.bitmap, expected.bitmap)
    np.testing.assert_array_equal(bits(actual.values), bits(expected.values))


# batch, KV heads, tokens, head_dim, entries kept of keys and of values, dtype, axis of heads, first, start, held, rows
CASES = {
    "prompt": (3, 2, 1000, 64, (20, 32), BF16, 2, [4, 4, 4], [0, 0, 0], [960, 0, 32], 960),
    "group": (3, 1, 160, 128, (40, 4), F16, 1, [36, 0, 96], [32, 96, 160], [64, 64, 64], 64),
}


@pytest.mark.parametrize("interpret", implementations(pytest))
@pytest.mark.parametrize("case", CASES)
def test_is_bit_equal_to_xla(case, interpret):
    batch, kv_heads, tokens, head_dim, kept, dtype, head_axis, first, start, held, rows = CASES[case]

    @jax.jit
    def run(sources, targets):
        prunes = [Prune(*pair) for pair in zip(sources, targets, strict=True)]
        ranges = (jnp.array(x, jnp.int32) for x in (first, start, held))
        return prune_pack(prunes, *ranges, rows=rows, head_axis=head_axis, interpret=interpret)

    for seed, kind in enumerate(["random", "adversarial", "ties", "equal", "skewed"]):
        rng = np.random.default_rng(seed)
        sources = [data(rng, (batch, tokens, kv_heads, head_dim), dtype, kind) for _ in range(2)]
        capacity = max(rows, 160)
        targets = [poisoned(rng, batch, kv_heads, capacity, head_dim, count, dtype) for count in kept]
        by_head = [x.swapaxes(1, 2) for x in sources]
        actual = run(sources if head_axis == 2 else by_head, targets)
        again = run(sources if head_axis == 2 else by_head, targets)
        for i, (x, count) in enumerate(zip(by_head, kept, strict=True)):
            mask = mj.magnitude_mask(x, 1 - count / head_dim)
            assert_same(actual[i], written(targets[i], x, mask, first, start, held, rows))
            assert_same(actual[i], again[i])


def agrees_within_an_ulp(actual, expected):
    """Whether 16-bit floating-point arrays agree but for the last bit."""
    apart = bits(actual).astype(np.int32) - bits(expected).astype(np.int32)
    return np.abs(apart) <= 1


@pytest.mark.parametrize("interpret", implementations(pytest))
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, F16), (128, BF16)])
def test_centred_and_rescaled(head_dim, dtype, interpret):
    """Values agree but for their last bit; masks but where magnitudes differ by no more."""
    batch, kv_heads, tokens, offset, kept = 2, 1, 72, 4, head_dim // 4
    rng = np.random.default_rng(7)
    key, value = (jnp.asarray(rng.standard_normal((batch, tokens, kv_heads, head_dim)) + 1, dtype) for _ in range(2))
    value = value.at[0, 5].set(0).at[0, 6, 0, 3].set(jnp.inf).at[0, 7, 0, 3].set(jnp.nan).at[0, 8].multiply(1e4)
    mean = jnp.asarray(rng.standard_normal((batch, kv_heads, head_dim)), jnp.float32)
    inv_freq = jnp.asarray(rope_frequencies(head_dim))
    targets = [poisoned(rng, batch, kv_heads, 96, head_dim, kept, dtype) for _ in range(2)]
    first, start, held = jnp.array([offset, 8]), jnp.array([0, 32]), jnp.array([64, 64])

    @jax.jit
    def run(key, value, targets):
        keys = Prune(key, targets[0], mean=Mean(mean, inv_freq, offset))
        values = Prune(value, targets[1], rescale=True)
        return prune_pack([keys, values], first, start, held, rows=64, head_axis=2, interpret=interpret)

    actual = run(key, value, targets)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    position = jnp.arange(tokens) + (start - first + offset)[:, None]
    centred = (key.astype(jnp.float32) - rotate(mean[:, :, None], position[:, None], inv_freq)).astype(dtype)
    sparsity = 1 - kept / head_dim
    mask = mj.magnitude_mask(value, sparsity)
    wanted = written(targets[1], rescale_to_norm(value, mask), mask, first, start, held, 64)
    np.testing.assert_array_equal(actual[1].bitmap, wanted.bitmap)
    assert agrees_within_an_ulp(actual[1].values, wanted.values).all()

    mask = mj.magnitude_mask(centred, sparsity)
    wanted = as_array(written(targets[0], centred, mask, first, start, held, 64))
    held_here, held_there = (mj.unpack(as_array(Packed(x.bitmap, jnp.ones_like(x.values)))) > 0 for x in (actual[0], wanted))
    same = np.asarray(held_here == held_there)
    assert same.mean() > 0.995
    assert agrees_within_an_ulp(*(np.where(same, mj.unpack(as_array(x)), 0) for x in (actual[0], wanted))).all()


def specs(batch, kv_heads, tokens, head_dim, kept, dtype, head_axis):
    shape = [batch, tokens, kv_heads, head_dim] if head_axis == 2 else [batch, kv_heads, tokens, head_dim]
    target = jax.eval_shape(lambda: bitmap.empty((batch, kv_heads), tokens, head_dim, kept, dtype))
    return Prune(jax.ShapeDtypeStruct(shape, dtype), Packed(target.bitmap, target.values))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "kept", "dtype", "head_axis", "sides"),
    [(128, 40, BF16, 2, 2), (128, 36, F16, 1, 2), (64, 20, BF16, 1, 1), (64, 64, F16, 2, 2), (128, 4, BF16, 1, 1)],
)
def test_lowers_for_cuda(head_dim, kept, dtype, head_axis, sides, centred):
    prune = specs(2, 4, 128, head_dim, kept, dtype, head_axis)
    mean = Mean(jax.ShapeDtypeStruct((2, 4, head_dim), jnp.float32), jax.ShapeDtypeStruct((head_dim // 2,), jnp.float32), 0)

    def call(prune, key, inv_freq, ranges):
        keys = prune._replace(mean=Mean(key, inv_freq, 4) if centred else None)
        both = [keys, prune._replace(rescale=centred)]
        return prune_pack(both[:sides], *ranges, rows=64, head_axis=head_axis)

    ranges = [jax.ShapeDtypeStruct((2,), jnp.int32)] * 3
    plain = Prune(*prune[:2])

    def flat(source, target, key, inv_freq, ranges):
        return call(Prune(source, target), key, inv_freq, ranges)

    assert "triton" in lower_for_cuda(flat, plain.source, plain.target, mean.key, mean.inv_freq, ranges)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["permute_bytes", "merge_bits", "as_words", "from_neighbour", "pack_pair", "shared"])
def test_instructions_do_what_their_twins_do(name):
    rng = np.random.default_rng(11)
    a, b, c = (jnp.asarray(rng.integers(-(2**31), 2**31, 64), jnp.int32) for _ in range(3))
    x = jnp.asarray(rng.standard_normal(64) * 1e4, jnp.float32)

    def run(a, b, c, x, *, interpret):
        if name == "permute_bytes":
            return triton.permute_bytes(a, b, 0x7340, interpret=interpret)
        if name == "merge_bits":
            once = triton.merge_bits(a, b, c, interpret=interpret)
            return triton.merge_bits(once, c, 0x33333333, interpret=interpret)
        if name == "as_words":
            return sum(triton.as_words(jnp.stack([a, b], axis=-1).astype(jnp.int16), interpret=interpret))
        if name == "from_neighbour":
            return triton.from_neighbour(a, interpret=interpret)
        if name == "pack_pair":
            return triton.pack_pair(x, -x, BF16, interpret=interpret) + triton.pack_pair(-x, x, F16, interpret=interpret)
        lane = jnp.arange(64, dtype=jnp.int32)
        memory = triton.shared_buffer(64 * 17, lane, interpret=interpret)
        start = triton.shared_offset(memory, lane * 68, interpret=interpret)
        for i in range(17):
            memory = triton.shared_store_word(memory, start, 4 * i, a, interpret=interpret)
        memory = triton.shared_append(memory, start + 2, [a + i for i in range(16)], b, interpret=interpret)
        words = [triton.shared_load(memory, start, 4 * i, clear=False, interpret=interpret) for i in range(17)]
        return functools.reduce(lambda total, word: total * 31 + word, words)

    def kernel(*refs):
        refs[-1][...] = run(*(ref[...] for ref in refs[:-1]), interpret=False)

    shape = jax.ShapeDtypeStruct((64,), jnp.int32)
    actual = triton.pallas_call(kernel, name=name, num_warps=2, out_shape=shape)(a, b, c, x)
    np.testing.assert_array_equal(actual, run(a, b, c, x, interpret=True))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"), [(96, BF16, "head_dim=96"), (64, jnp.float32, "float32"), (256, F16, "256")]
)
def test_says_what_it_cannot_run(head_dim, dtype, message):
    prune = specs(1, 1, 64, head_dim, 32, dtype, 2)
    ranges = [jax.ShapeDtypeStruct((1,), jnp.int32)] * 3
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda s, t, r: prune_pack([Prune(s, t)], *r, rows=32, head_axis=2), *prune[:2], ranges)
