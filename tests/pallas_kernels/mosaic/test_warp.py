"""The instruction set of the Mosaic GPU kernels: its two implementations, `ptx` and `simt`, against each other."""

import functools
import inspect
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.pallas_kernels.mosaic import lowering, ptx, simt
from mustafar_jax.pallas_kernels.mosaic.warp import LANES, Warp
from tests.helpers import bits
from tests.pallas_kernels.lowering import lower_for_cuda

WARPS = 4
METHODS = {name: method for name, method in vars(Warp).items() if inspect.isfunction(method) and name[0] != "_"}


@pytest.mark.parametrize("implementation", [ptx.Warp, simt.Warp])
def test_both_have_every_method_and_no_other(implementation):
    public = {name: x for name, x in vars(implementation).items() if inspect.isfunction(x) and name[0] != "_"}
    assert public.keys() == METHODS.keys()
    for name, method in public.items():
        parameters, wanted = (
            [(x.name, x.kind, x.default) for x in inspect.signature(f).parameters.values()]
            for f in (method, METHODS[name])
        )
        if name != "branch":  # its default is a function
            assert parameters == wanted, name


def exchange(w, shared, store, load):
    """What `load` reads of a warp's own 512 bytes of shared memory, which held 5s, after `store` has written there."""
    own = shared + w.warp() * 512
    w.store_shared(own + (w.lane() << 4), [w.integer(5)] * 4)
    w.sync_warp()
    store(own)
    w.sync_warp()
    return load(own)


def everywhere(w, shared, x):
    """A word of another warp, after `sync_block`."""
    index = w.warp() * LANES + w.lane()
    w.store_shared(shared + (index << 2), [x])
    w.sync_block()
    return w.load_shared(shared + ((index ^ 37) << 2), 1)


def f(w, x):
    """Words as moderate numbers."""
    return w.as_float((x & 0x83FFFFFF) | 0x3C000000)


# of a warp, shared memory and three random words; a list of words
INSTRUCTIONS = {
    "integer": lambda w, s, a, b, c: [w.integer(2**32 - 5)],
    "number": lambda w, s, a, b, c: [w.as_bits(w.number(-0.1))],
    "lane": lambda w, s, a, b, c: [w.lane()],
    "warp": lambda w, s, a, b, c: [w.warp()],
    "block": lambda w, s, a, b, c: [w.block()],
    "select": lambda w, s, a, b, c: [w.select(a < b, a, c), w.select(f(w, a) > f(w, b), a, c)],
    "maximum": lambda w, s, a, b, c: [w.as_bits(w.maximum(f(w, a), f(w, b)))],
    "as_float": lambda w, s, a, b, c: [w.as_bits(f(w, a) * f(w, b) - f(w, c))],
    "as_bits": lambda w, s, a, b, c: [w.as_bits(f(w, a) + 1.0)],
    "pack_pair": lambda w, s, a, b, c: [w.pack_pair(f(w, a), f(w, b)), w.pack_pair(f(w, a), f(w, b), float16=True)],
    "unpack_pair": lambda w, s, a, b, c: [w.as_bits(x) for x in w.unpack_pair(w.pack_pair(f(w, a), f(w, b)))],
    "unpack_pair, float16": lambda w, s, a, b, c: [
        w.as_bits(x) for word in (a & 0x03FF03FF, b & 0xFBFFFBFF) for x in w.unpack_pair(word, float16=True)
    ],
    "pick_halves": lambda w, s, a, b, c: [w.pick_halves(a, b, 0), w.pick_halves(a, b, 1)],
    "pick_bytes": lambda w, s, a, b, c: [w.pick_bytes(a, b, c & 0x7777)],
    "count_bits": lambda w, s, a, b, c: [w.count_bits(a & b)],
    "reverse_bits": lambda w, s, a, b, c: [w.reverse_bits(a)],
    "highest_bit": lambda w, s, a, b, c: [w.highest_bit(a >> (b & 31)), w.highest_bit(w.integer(0))],
    "clear_bit": lambda w, s, a, b, c: [w.clear_bit(a, b & 63)],
    "shift_if_empty": lambda w, s, a, b, c: [
        x for queue in w.shift_if_empty([[w.select(a < b, w.integer(0), a), b, b, c], [c, a, a]]) for x in queue
    ],
    "use_bit": lambda w, s, a, b, c: [
        x
        for position in (b & 3, w.highest_bit(w.integer(0)))  # of an empty word: above 31
        for queue in w.use_bit(
            [[w.select(a < b, w.integer(4), w.select(a < c, w.integer(0), a)), b, c], [c, a, a]], position
        )
        for x in queue
    ],
    "shuffle": lambda w, s, a, b, c: [w.shuffle(a, b & 31), w.as_bits(w.shuffle(f(w, a), c & 31))],
    "transpose": lambda w, s, a, b, c: [w.transpose(a)],
    "any": lambda w, s, a, b, c: [w.select(w.any((w.lane() == 7) & (a > b)), b, c)],
    "sync_block": lambda w, s, a, b, c: everywhere(w, s, a),
    "load_shared": lambda w, s, a, b, c: exchange(
        w, s, lambda at: w.store_shared(at + (w.lane() << 4), [a, b, c, a]), lambda at: w.load_shared(at, 4, 32)
    ),
    "store_shared": lambda w, s, a, b, c: exchange(
        w,
        s,
        lambda at: w.store_shared(at + ((w.lane() ^ 3) << 3), [a, b], 8),
        lambda at: w.load_shared(at + (w.lane() << 3), 2, 8),
    ),
    "store_shared, where": lambda w, s, a, b, c: exchange(
        w,
        s,
        lambda at: [
            w.store_shared(at + (w.lane() << 4), [a, b], 8, where=a > b),
            w.store_shared(at + (w.lane() << 4), [c], where=b < c),
            w.store_shared(at + (w.lane() << 4), [a, b, c, a], where=(w.lane() & 7) == 5),
        ],
        lambda at: w.load_shared(at + (w.lane() << 4), 4),
    ),
    "store_shared_half": lambda w, s, a, b, c: exchange(
        w,
        s,
        lambda at: [
            w.store_shared_half(at + (w.lane() << 2), a, 1),
            w.store_shared_half(at + (w.lane() << 2) + 2, b, 0, where=a > b),
        ],
        lambda at: w.load_shared(at + ((w.lane() ^ 5) << 2), 1),
    ),
    "loop": lambda w, s, a, b, c: w.loop(
        w.warp(), w.integer(9), 3, [a, b], lambda i, carry: [carry[0] * 3 + i, carry[1] ^ carry[0]]
    ),
    "branch": lambda w, s, a, b, c: w.branch(
        w.warp() > 1, [a, b], lambda carry: [carry[0] - carry[1], c], lambda carry: [carry[1] % 1000, carry[0] // 7]
    ),
}
# rounded in another order, or approximated
INEXACT = {
    "exp2": lambda w, s, a, b, c: [w.as_bits(w.exp2(f(w, a) * 10.0))],
    "log2": lambda w, s, a, b, c: [w.as_bits(w.log2(w.as_float(a & 0x7EFFFFFF | 0x00800000) * 0.5))],
    "reciprocal": lambda w, s, a, b, c: [w.as_bits(w.reciprocal(f(w, a))), w.as_bits(w.reciprocal(f(w, b) * 1e6))],
    "fused": lambda w, s, a, b, c: [w.as_bits(w.fused(f(w, a), f(w, b), f(w, c)))],
    "multiply_add": lambda w, s, a, b, c: [
        w.as_bits(x)
        for x in w.multiply_add(
            [w.pack_pair(f(w, x), f(w, y)) for x, y in ((a, b), (b, c), (c, a), (a, c))],
            [w.pack_pair(f(w, x), f(w, y)) for x, y in ((b, a), (c, b))],
            [f(w, x) for x in (a, b, c, a)],
        )
    ],
    # codes, which are subnormal numbers, and other numbers
    "multiply_add, float16": lambda w, s, a, b, c: [
        w.as_bits(x * 2.0**24)
        for x in w.multiply_add(
            [x & 0x00FF00FF for x in (a, b, c, a ^ b)],
            [w.pack_pair(f(w, x), f(w, y), float16=True) for x, y in ((b, a), (c, b))],
            [w.number(0)] * 4,
            float16=True,
        )
    ],
}
USED_BY_ALL = {"row", "load", "store", "sync_warp"}
BOTH = INSTRUCTIONS | INEXACT


def random_words(blocks=2):
    return jnp.asarray(np.random.default_rng(3).integers(0, 2**32, (3, blocks * WARPS * LANES), dtype=np.uint32))


@functools.cache
def result_words(name):
    """How many words an instruction gives."""
    counts = []
    zero = np.zeros(LANES, np.uint32)
    body = lambda w: counts.append(len(BOTH[name](w, zero, zero, zero, zero)))  # noqa: E731
    simt.run(body, blocks=1, warps=1, shared_bytes=2048, dtype=jnp.bfloat16)
    return counts[0]


def apply(names, dtype, words, *, interpret, teams=1):
    """Instructions, one after the other, on [3, threads] words; [threads, results of all]."""
    threads, results = words.shape[1], sum(map(result_words, names))

    def body(w, shared, source, out):
        thread = (w.block() * WARPS + w.warp()) * LANES + w.lane()
        row = w.row(source, w.block(), 0)
        a, b, c = (w.load(row, thread << 2, 1, 4 * threads * i, early=i > 0)[0] for i in range(3))
        for i, x in enumerate(x for name in names for x in BOTH[name](w, shared, a, b, c)):
            w.store(out, (thread * results + i) << 2, x, where=thread < threads)

    [out] = lowering.kernel_call(
        body,
        words,
        out_shape=[jax.ShapeDtypeStruct((threads, results), jnp.uint32)],
        blocks=threads // (WARPS * LANES),
        warps=WARPS,
        shared_bytes=WARPS * 512,
        dtype=dtype,
        interpret=interpret,
        teams=teams,
    )
    return out


def test_every_instruction_is_tested():
    assert {name.split(",")[0] for name in BOTH} | USED_BY_ALL == {*METHODS}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", BOTH)
def test_an_instruction_does_what_its_twin_does(name, dtype):
    one, other = (
        np.asarray(jax.jit(functools.partial(apply, [name], dtype, interpret=interpret))(random_words()))
        for interpret in (True, False)
    )
    if name in INEXACT:
        np.testing.assert_allclose(one.view(np.float32), other.view(np.float32), rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["block", "warp", "sync_block", "load_shared"])
def test_teams_do_what_blocks_by_themselves_do(name):
    """Three blocks, two at a time: one is run twice."""
    one, other = (
        jax.jit(functools.partial(apply, [name], jnp.bfloat16, interpret=interpret, teams=2))(random_words(3))
        for interpret in (True, False)
    )
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def snippets():
    """All inline assembly, (code, letters of results, constraints of operands), as `ptx.Warp` emits it."""
    found = {}
    emit = ptx.Warp._asm

    def spy(self, code, results, constraints, arguments, *, effects):
        values = [x.value if isinstance(x, ptx.Register) else x for x in arguments]
        found[code, tuple(results), tuple(constraints or map(ptx._letter, values))] = None
        return emit(self, code, results, constraints, arguments, effects=effects)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptx.Warp, "_asm", spy)
        for dtype in (jnp.bfloat16, jnp.float16):
            call = functools.partial(apply, list(BOTH), dtype, interpret=False)
            assert "mosaic_gpu" in lower_for_cuda(call, random_words())
            assert "mosaic_gpu" in lower_for_cuda(functools.partial(call, teams=3), random_words(3))
    return [*found]


TYPES = {"r": "b32", "f": "f32", "l": "b64", "b": "pred"}


def as_ptx(number, code, results, constraints):
    """A kernel of nothing but a snippet; an operand tied to a result has its register."""
    letters = [x.removeprefix("&") for x in results] + [*constraints]
    names = [f"%x{i}" if x.isalpha() else f"%x{x}" for i, x in enumerate(letters)]
    registers = [f".reg .{TYPES[x]} %x{i};" for i, x in enumerate(letters) if x.isalpha()]
    code = re.sub(r"\$(\d+)", lambda match: names[int(match[1])], code)
    return f".visible .entry k{number}() {{ {' '.join(registers)} {code} ret; }}"


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas, NVIDIA's assembler")
def test_the_assembler_takes_every_instruction(snippets, tmp_path):
    kernels = [as_ptx(i, *snippet) for i, snippet in enumerate(snippets)]
    source = tmp_path / "instructions.ptx"
    source.write_text("\n".join([".version 8.2", ".target sm_90a", ".address_size 64", *kernels]))
    command = ["ptxas", "--gpu-name", "sm_90a", "--output-file", str(tmp_path / "out.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_results_of_several_steps_share_no_register_with_operands(snippets):
    """A result that is written before the last operand is read must be an early clobber."""
    walks = [results for code, results, _ in snippets if code.count("@!left mad.lo") > 1]
    assert walks
    assert {x for results in walks for x in results} == {"&r"}


def test_only_early_loads_are_ordered_by_barriers(snippets):
    """An assembler may put off what is read as constant."""
    loads = {code.split(".v")[0].split(".b32")[0].split()[-1] for code, *_ in snippets if "ld.global" in code}
    assert loads == {"ld.global.nc.L1::no_allocate", "ld.global.L1::no_allocate"}


def run_on(warps, body):
    simt.run(lambda w: body(w, w.integer(0)), blocks=1, warps=warps, shared_bytes=1024, dtype=jnp.bfloat16)


RACES = {  # warps, what they do
    "a lane's word read by another": (1, lambda w, s: [put(w, s), get(w, s, 1)]),
    "a word overwritten that another lane has read": (1, lambda w, s: [get(w, s, 1), put(w, s)]),
    "a word that all lanes have read": (1, lambda w, s: [w.load_shared(s, 1), put(w, s)]),
    "another warp's word behind a warp's barrier": (2, lambda w, s: [put(w, s), w.sync_warp(), get(w, s, 32)]),
    "different values at one place": (1, lambda w, s: w.store_shared(s, [w.lane()])),
    "halves of one word": (1, lambda w, s: [put(w, s), w.store_shared_half(s + ((w.lane() ^ 1) << 2), w.lane(), 0)]),
}
NO_RACES = {
    "behind a barrier": (1, lambda w, s: [put(w, s), w.sync_warp(), get(w, s, 1), w.sync_warp(), put(w, s)]),
    "its own word": (2, lambda w, s: [put(w, s), get(w, s, 0), put(w, s)]),
    "behind the block's barrier": (
        2,
        lambda w, s: [put(w, s), w.sync_block(), get(w, s, 32), w.sync_block(), put(w, s)],
    ),
    "the same value at one place": (1, lambda w, s: w.store_shared(s, [w.integer(1)])),
    "neighbouring halves": (1, lambda w, s: w.store_shared_half(s + (w.lane() << 1), w.lane(), 0)),
}


def put(w, shared):
    w.store_shared(shared + ((w.warp() * LANES + w.lane()) << 2), [w.lane()])


def get(w, shared, distance):
    """The word of another thread."""
    w.load_shared(shared + (((w.warp() * LANES + w.lane()) ^ distance) << 2), 1)


@pytest.mark.parametrize("name", RACES)
def test_finds_a_race(name):
    with pytest.raises(RuntimeError, match="shared memory"):
        run_on(*RACES[name])


@pytest.mark.parametrize("name", NO_RACES)
def test_finds_no_race_where_there_is_none(name):
    run_on(*NO_RACES[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_product_is_one_of_matrices(dtype):
    """`multiply_add` of operands that a matrix product is known of: rows of a times columns of b."""
    rng = np.random.default_rng(5)
    a, b = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((16, 16), (16, 8)))
    g, t = np.arange(LANES) >> 2, np.arange(LANES) & 3
    out = np.zeros((16, 8), np.float32)

    def words(x, row, column, step):
        """Entries (row, column) and the next along an axis, in a word."""
        pair = np.stack([bits(x)[row, column], bits(x)[row + step[0], column + step[1]]], axis=-1)
        return np.ascontiguousarray(pair).view(np.uint32)[..., 0]

    def body(w):
        left = [words(a, g + 8 * (i & 1), 2 * t + 8 * (i >> 1), (0, 1)) for i in range(4)]
        right = [words(b, 2 * t + 8 * i, g, (1, 0)) for i in range(2)]
        for i, x in enumerate(w.multiply_add(left, right, [w.number(1)] * 4)):
            out[g + 8 * (i >> 1), 2 * t + (i & 1)] = x

    simt.run(body, blocks=1, warps=1, shared_bytes=4, dtype=dtype)
    expected = 1 + np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
