"""Elementwise functions that are compiled as one operation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.fusion import fuse
from tests.pallas_kernels.lowering import lower_for_cuda

THREADS, N = 128, 4


def apply(function, operands, *shared, interpret):
    """`fuse` in a kernel."""

    def call(*arrays, interpret):
        return fuse(function, arrays[: len(operands)], *arrays[len(operands) :], interpret=interpret)

    def kernel(*refs):
        refs[-1][...] = call(*(ref[...] for ref in refs[:-1]), interpret=interpret)

    result = jax.eval_shape(functools.partial(call, interpret=True), *operands, *shared)
    return tl.pallas_call(kernel, name="fused", num_warps=4, interpret=interpret, out_shape=result)(*operands, *shared)


def integers(seed, shape=(THREADS, N)):
    return jnp.asarray(np.random.default_rng(seed).integers(-(2**31), 2**31, shape), jnp.int32)


def floats(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((THREADS, N)), jnp.float32)


def on_integers(columns, x, *, interpret):
    """Every operation on integers; neighbours exchange, so threads must be in order."""
    a, b = columns
    mixed = [(p & ~q | x) ^ (q << 3) for p, q in zip(a, b, strict=True)]
    shifted = [p * 7 - (q >> 5) + lax.shift_right_logical(-p, 9) for p, q in zip(a, reversed(mixed), strict=True)]
    counted = [p + lax.population_count(q) for p, q in zip(shifted, mixed, strict=True)]
    beside = tl.from_neighbour(counted[1], interpret=interpret)
    return [tl.merge_bits(p, beside, 0x0F0F0F0F, interpret=interpret) for p in counted]


def on_floats(columns, x, *, interpret):
    """Every operation on numbers, their bits, and choices between them."""
    a, b = columns
    scale = lax.bitcast_convert_type(x & 0x007FFFFF | 0x3F800000, jnp.float32)  # 1 to 2
    products = [p * scale + q for p, q in zip(a, b, strict=True)]
    clipped = [jnp.clip(p - q, -0.5, 0.5) for p, q in zip(products, b, strict=True)]
    roots = [jnp.sqrt(p * p) / scale for p in clipped]
    return [jnp.where((p > 0) & (q < jnp.inf), q, p) for p, q in zip(products, roots, strict=True)]


def on_halves(columns, *, dtype, interpret):
    """Halves of words as numbers, none of them NaN or infinite, and back."""
    columns = [[word & np.int32(-0x40004001) for word in columns[0]]]
    pairs = [tl.float32_pair(word, dtype, interpret=interpret) for word in columns[0]]
    return [tl.pack_pair(high, low, dtype, interpret=interpret) for low, high in pairs]


def to_one(columns, x, *, interpret):
    """One number from a row."""
    return functools.reduce(jnp.add, columns[0], x)


CASES = {
    "integers": (on_integers, [integers(0), integers(1)], [integers(2, THREADS)]),
    "floats": (on_floats, [floats(0), floats(1)], [integers(2, THREADS)]),
    "bfloat16": (functools.partial(on_halves, dtype=jnp.bfloat16), [integers(3)], []),
    "float16": (functools.partial(on_halves, dtype=jnp.float16), [integers(4)], []),
    "rows to numbers": (to_one, [integers(5)], [integers(6, THREADS)]),
    "no operands": (lambda _, x, y, *, interpret: x ^ y + 1, [], [integers(7, THREADS), integers(8, THREADS)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_equals_the_function(name):
    function, operands, shared = CASES[name]
    fused, plain = (
        apply(functools.partial(function, interpret=interpret), operands, *shared, interpret=interpret)
        for interpret in (False, True)
    )
    assert fused.dtype == plain.dtype
    tolerance = 1e-6 if fused.dtype == jnp.float32 else 0  # XLA may round a product and a sum at once
    np.testing.assert_allclose(fused, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name):
    function, operands, shared = CASES[name]
    function = functools.partial(function, interpret=False)
    assert "triton" in lower_for_cuda(functools.partial(apply, function, interpret=False), operands, *shared)


def test_is_one_assembly(monkeypatch):
    """All its instructions, the results after all operands were read."""
    written = []
    monkeypatch.setattr(tl, "assembly", lambda code, args, *_, **__: written.append(code) or args[0])

    def function(columns, x):
        return [columns[0][1] & 5, x - columns[0][0]]

    fuse(function, [integers(0, (THREADS, 2))], integers(1, THREADS), interpret=False)
    [code] = written
    assert code.split("; ") == [
        "{ .reg .b32 v0",
        "and.b32 v0, $3, 0x00000005",
        ".reg .b32 v1",
        "sub.s32 v1, $4, $2",
        ".reg .b32 v2",
        "mov.b32 v2, v0",
        ".reg .b32 v3",
        "mov.b32 v3, v1",
        "mov.b32 $0, v2",
        "mov.b32 $1, v3",
        "}",
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (jnp.sin, "sin .* cannot be fused"),
        (lambda x: x.view(jnp.uint32).view(jnp.float32), "uint32 cannot be fused"),
        (lambda x: x > 0, "function returned .*bool.* cannot be fused"),
    ],
    ids=["an operation", "a dtype", "a result"],
)
def test_says_what_it_cannot_fuse(function, message):
    with pytest.raises(TypeError, match=message):
        fuse(lambda columns: [function(x) for x in columns[0]], [floats(0)], interpret=False)


def test_says_that_a_function_uses_what_it_is_not_given():
    def run(x):
        return fuse(lambda columns: [column + x for column in columns[0]], [floats(0)], interpret=False)

    with pytest.raises(TypeError, match=r"Tracer.* cannot be fused"):
        jax.eval_shape(run, jnp.float32(1))


@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (lambda columns: columns[0][:2], [integers(0)]),
        (lambda columns: [*columns[0][:2], *columns[1][:2]], [integers(0), floats(1)]),
        (lambda _: [jnp.int32(1)] * 4, []),
        (lambda _: [jnp.int32(1)], []),
    ],
    ids=["too few columns", "two dtypes", "a row of nothing loaded", "a row of one"],
)
def test_says_what_a_function_must_return(function, operands):
    with pytest.raises(ValueError, match=r"wanted one array, or a list of \d columns of one dtype"):
        fuse(function, operands, interpret=False)
