"""The inline assembly's plain JAX twins: right by themselves, and equal to the assembly on a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.pallas_kernels.triton import language as tl
from tests.helpers import bits
from tests.pallas_kernels.lowering import lower_for_cuda

LANES = 128


def elementwise(function, *args, interpret):
    """The function on int32 or float32 [128] arrays in a kernel; int32 [128]."""

    def kernel(*refs):
        refs[-1][...] = function(*(ref[...] for ref in refs[:-1]), interpret=interpret)

    shape = jax.ShapeDtypeStruct((LANES,), jnp.int32)
    return tl.pallas_call(kernel, name="twin", num_warps=4, interpret=interpret, out_shape=shape)(*args)


def words(seed):
    """Random int32 with few and with many bits, zero and the extremes."""
    rng = np.random.default_rng(seed)
    any_word = rng.integers(-(2**31), 2**31, LANES) >> rng.integers(0, 32, LANES)
    any_word[:4] = 0, -1, 2**31 - 1, -(2**31)
    return jnp.asarray(any_word, jnp.int32)


def numbers(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(LANES) * 100, jnp.float32)


def swap_halves(a, b, *, interpret):
    """`as_words` of the halves of two words, the second one's first."""
    halves = tl.stack([x for word in (b, a) for x in tl.as_dtype_pairs(word, jnp.int16)])
    first, second = tl.unstack(tl.as_words(halves, interpret=interpret))
    return first * 31 + second


def append_to_shared(a, kept, *, interpret):
    """16 words made of a, appended behind a half, and all that is then in shared memory, hashed."""
    lane = jnp.arange(LANES, dtype=jnp.int32)
    memory = tl.shared_buffer(LANES * 17, lane, interpret=interpret)
    start = tl.shared_offset(memory, lane * 68, interpret=interpret)
    for i in range(17):
        memory = tl.shared_store_word(memory, start, 4 * i, a, interpret=interpret)
    memory = tl.shared_append(memory, start + 2, [a + i for i in range(16)], kept, interpret=interpret)
    read = [tl.shared_load(memory, start, 4 * i, clear=False, interpret=interpret) for i in range(17)]
    return functools.reduce(lambda total, word: total * 31 + word, read)


HELPERS = {
    "highest_bit": (tl.highest_bit, (words(0),)),
    "pick low halves": (functools.partial(tl.pick_halves, half=0), (words(0), words(1))),
    "pick high halves": (functools.partial(tl.pick_halves, half=1), (words(0), words(1))),
    "pack bfloat16": (functools.partial(tl.pack_pair, dtype=jnp.bfloat16), (numbers(0), numbers(1))),
    "pack float16": (functools.partial(tl.pack_pair, dtype=jnp.float16), (numbers(0), numbers(1))),
    "permute_bytes": (functools.partial(tl.permute_bytes, selector=0x7340), (words(0), words(1))),
    "merge_bits": (tl.merge_bits, (words(0), words(1), words(2))),
    "merge_bits by a constant": (functools.partial(tl.merge_bits, mask=0x33333333), (words(0), words(1))),
    "as_words": (swap_halves, (words(0), words(1))),
    "from_neighbour": (tl.from_neighbour, (words(0),)),
    "shared_append": (append_to_shared, (words(0), words(1))),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_equals_its_twin(name):
    function, args = HELPERS[name]
    one, other = (elementwise(function, *args, interpret=interpret) for interpret in (True, False))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_lowers_for_cuda(name):
    function, args = HELPERS[name]
    assert "triton" in lower_for_cuda(functools.partial(elementwise, function, interpret=False), *args)


def test_permute_bytes():
    both = np.stack([np.asarray(words(seed)) for seed in (0, 1)], axis=1).view(np.uint8)
    permuted = np.asarray(tl.permute_bytes(words(0), words(1), 0x7340, interpret=True))
    np.testing.assert_array_equal(permuted.view(np.uint8).reshape(-1, 4), both[:, [0, 4, 3, 7]])


def test_merge_bits():
    a, b, mask = (np.asarray(words(seed)) for seed in range(3))
    np.testing.assert_array_equal(tl.merge_bits(*map(jnp.asarray, (a, b, mask)), interpret=True), b ^ (a ^ b) & mask)


def test_as_words():
    a, b = words(0), words(1)
    halves = jnp.asarray(np.stack([np.asarray(a), np.asarray(b)], axis=1).view(np.int16))
    np.testing.assert_array_equal(tl.as_words(halves, interpret=True), np.stack([a, b], axis=1))


def test_from_neighbour():
    swapped = np.asarray(words(0)).reshape(-1, 2)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(tl.from_neighbour(words(0), interpret=True), swapped)


def test_shared_append():
    lane = jnp.arange(2, dtype=jnp.int32)
    memory = tl.shared_zeros(8, lane, interpret=True)
    entries = [jnp.asarray([i | (i + 1) << 16] * 2, jnp.int32) for i in range(1, 33, 2)]  # half b is b + 1
    kept = jnp.asarray([1 - 2**31 + (1 << 4), 0b1010], jnp.int32)
    appended = tl.shared_append(memory, lane * 16 + 2, entries, kept, interpret=True)
    np.testing.assert_array_equal(appended.reshape(2, 8)[:, :5], [[0, 1, 5, 32, 0], [0, 2, 4, 0, 0]])


def test_highest_bit():
    expected = [int(x) % 2**32 for x in words(0)]
    np.testing.assert_array_equal(tl.highest_bit(words(0), interpret=True), [x.bit_length() - 1 for x in expected])


def test_pick_halves():
    pairs = [np.asarray(words(seed)).view(np.uint16).reshape(-1, 2) for seed in (0, 1)]
    for half in range(2):
        picked = tl.pick_halves(words(0), words(1), half, interpret=True)
        expected = np.stack([pair[:, half] for pair in pairs], axis=1)
        np.testing.assert_array_equal(np.asarray(picked).view(np.uint16).reshape(-1, 2), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_pack_pair(dtype):
    packed = tl.pack_pair(numbers(0), numbers(1), dtype, interpret=True)
    expected = jnp.stack([numbers(0), numbers(1)], axis=1).astype(dtype)
    np.testing.assert_array_equal(np.asarray(packed).view(np.uint16).reshape(-1, 2), bits(expected))


def shared_round_trip(seed, *, interpret):
    """Words and halves written to shared memory, some of them, then read; read again after clearing."""

    def kernel(word_ref, first_ref, second_ref):
        lane = jnp.arange(LANES, dtype=jnp.int32)
        memory = tl.shared_zeros(2 * LANES, lane, interpret=interpret)
        start = tl.shared_offset(memory, 4 * lane, interpret=interpret)
        word = word_ref[...]
        memory = tl.shared_store_word(memory, start, 4 * LANES, word, interpret=interpret)
        for half in range(2):
            where = word & (1 << half)
            memory = tl.shared_store_half(memory, start + 2 * half, word, 1 - half, where, interpret=interpret)
        memory = tl.synchronise(memory, interpret=interpret)
        other = tl.shared_offset(memory, 4 * (lane ^ 37), interpret=interpret)  # what another thread wrote
        read = [tl.shared_load(memory, other, offset, interpret=interpret) for offset in (0, 4 * LANES)]
        first_ref[...] = read[0] ^ read[1]
        memory = tl.synchronise(memory, read, interpret=interpret)
        second_ref[...] = tl.shared_load(memory, start, 4 * LANES, clear=False, interpret=interpret)

    shape = jax.ShapeDtypeStruct((LANES,), jnp.int32)
    call = tl.pallas_call(kernel, name="shared", num_warps=4, interpret=interpret, out_shape=[shape, shape])
    return call(words(seed))


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_shared_memory(interpret):
    first, second = shared_round_trip(3, interpret=interpret)
    word = np.asarray(words(3)).view(np.uint32)
    swapped = np.where(word & 1, word >> 16, 0) | np.where(word & 2, word << 16, 0)
    np.testing.assert_array_equal(np.asarray(first).view(np.uint32), (swapped ^ word)[np.arange(LANES) ^ 37])
    np.testing.assert_array_equal(second, 0)


def test_shared_memory_lowers_for_cuda():
    assert "triton" in lower_for_cuda(functools.partial(shared_round_trip, 3, interpret=False))


def test_a_kernel_can_be_mapped():
    args = jnp.stack([words(0), words(1)])
    call = functools.partial(elementwise, tl.highest_bit, interpret=False)
    assert "triton" in lower_for_cuda(jax.vmap(call), args)
