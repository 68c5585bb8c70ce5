"""Pallas lowered through Triton: everything that this package takes from that backend, and what it adds to it.

The one module that imports `jax.experimental.pallas.triton`. It adds what Pallas leaves out: a few instructions, and
shared memory with addresses. Each helper is inline assembly in a compiled kernel and plain JAX, its twin, where
`interpret` is true.

**Shared memory.** The compiler takes inline assembly for pure functions of their operands. A `Memory` is therefore
a value that every access takes and every change returns, as a state monad threads its state: compiled, it is the
buffer's address, and the data dependence through it is what keeps the accesses in order; interpreted, it is the
buffer's contents. Use each `Memory` once for a change; reads belong before the `synchronise` that is given their
results.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mustafar_jax.pallas_kernels import cuda
from mustafar_jax.sharding import outputs_as, varying_as

WARP = 32
MIN_COMPUTE_CAPABILITY = 8.0
SHARED_BYTES = 48 * 1024
"""Static shared memory that a block of any CUDA GPU may have."""

Memory = jax.Array
"""A buffer in shared memory: see the module."""

Ref = Any
"""A kernel's view of an operand; Pallas has no public type for it. Comments give the shapes."""


def why_not(*, dtype: Any, head_dim: int, queries_per_head: int = 1) -> str | None:
    """Why these kernels cannot run something, in words, or None: see `cuda.why_not`."""
    return cuda.why_not(
        "Triton", _runs_on, "8.0 or later", dtype=dtype, head_dim=head_dim, queries_per_head=queries_per_head
    )


def check_supported(*, dtype: Any, head_dim: int, queries_per_head: int = 1) -> None:
    """Raise NotImplementedError where `why_not` has a reason."""
    if reason := why_not(dtype=dtype, head_dim=head_dim, queries_per_head=queries_per_head):
        raise NotImplementedError(reason)


def _runs_on(capability: float) -> bool:
    return capability >= MIN_COMPUTE_CAPABILITY


def pallas_call(
    kernel: Callable[..., None],
    *,
    name: str,
    num_warps: int,
    num_stages: int = 1,
    interpret: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """`pl.pallas_call` through Triton; lowering it for another platform than CUDA raises NotImplementedError."""
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)

    def run(*operands: jax.Array) -> Any:
        first, *rest = varying_as(operands, operands)
        typed = options | {"out_shape": outputs_as(options["out_shape"], first)}
        call = pl.pallas_call(kernel, name=name, compiler_params=params, interpret=interpret, **typed)
        return call(first if interpret else cuda.only(first, kernels="Triton", before=_silence_deprecation), *rest)

    return run


def _silence_deprecation() -> None:
    # jax >= 0.11 announces that this backend will go. It warns when it lowers a kernel, so the filter is set right
    # before: one that was set at import may be gone by then.
    message = "The Pallas Triton backend is deprecated"
    warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)


load, store = plgpu.load, plgpu.store


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [m, n] of [m, k] and [k, n]."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of a last axis of 2, without moving data between lanes."""
    first, second = jnp.split(x, 2, axis=-1)
    return first.reshape(x.shape[:-1]), second.reshape(x.shape[:-1])


def unstack(x: jax.Array) -> list[jax.Array]:
    """The slices of the last axis, a power of two, in order, without moving data between lanes."""
    size = x.shape[-1]
    if size == 1:
        return [x.reshape(x.shape[:-1])]
    even, odd = split(x.reshape(*x.shape[:-1], size // 2, 2))
    return [part for pair in zip(unstack(even), unstack(odd), strict=True) for part in pair]


def stack(parts: Sequence[jax.Array]) -> jax.Array:
    """The inverse of `unstack`."""
    if len(parts) == 1:
        return parts[0][..., None]
    pairs = jnp.stack([stack(parts[0::2]), stack(parts[1::2])], axis=-1)  # pairs are what can be stacked
    return pairs.reshape(*pairs.shape[:-2], len(parts))


def as_dtype_pairs(words: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The low and the high half of int32 words, as 16-bit floating point."""
    low, high = words.astype(jnp.int16), lax.shift_right_logical(words, np.int32(16)).astype(jnp.int16)
    return lax.bitcast_convert_type(low, dtype), lax.bitcast_convert_type(high, dtype)


def float32_pair(word: jax.Array, dtype: Any, *, interpret: bool) -> list[jax.Array]:
    """The inverse of `pack_pair`: the low and the high half of int32 words as float32."""
    if interpret:
        return [x.astype(jnp.float32) for x in as_dtype_pairs(word, dtype)]
    if dtype == jnp.bfloat16:
        return [lax.bitcast_convert_type(bits, jnp.float32) for bits in (word << 16, word & np.int32(-1 << 16))]
    # not by casts, as the twin: what is fused knows no 16-bit types
    code = "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {}; }}"
    return [assembly(code.format(half), [word], "=f,r", dtype=jnp.float32) for half in "lh"]


def highest_bit(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Position of the highest set bit of int32 x; -1 for 0. One instruction, where `31 - clz` takes two or more."""
    if interpret:
        return 31 - lax.clz(x)
    return _asm("bfind.u32 $0, $1;", x)


def pick_halves(a: jax.Array, b: jax.Array, half: int, *, interpret: bool) -> jax.Array:
    """int32: half `half` (0 low, 1 high) of a in the low half, the same half of b in the high one."""
    if interpret:
        shift = np.int32(16 * half)
        low, high = (lax.shift_right_logical(x, shift) & 0xFFFF for x in (a, b))
        return low | (high << 16)
    return _asm(f"prmt.b32 $0, $1, $2, {('0x5410', '0x7632')[half]};", a, b)


def pack_pair(low: jax.Array, high: jax.Array, dtype: Any, *, interpret: bool) -> jax.Array:
    """int32: two float32 rounded to a 16-bit dtype, `low` in the low half."""
    if interpret:
        bits = (lax.bitcast_convert_type(x.astype(dtype), jnp.int16).astype(jnp.int32) for x in (low, high))
        first, second = bits
        return (first & 0xFFFF) | (second << 16)
    name = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    return _asm(f"cvt.rn.{name}.f32 $0, $2, $1;", low, high, constraints="=r,f,f")


def permute_bytes(a: jax.Array, b: jax.Array, selector: int, *, interpret: bool) -> jax.Array:
    """int32 of four bytes of a (0 to 3) and b (4 to 7), as the hexadecimal digits of the selector name them."""
    if interpret:
        both = jnp.concatenate([lax.bitcast_convert_type(x, jnp.uint8) for x in (a, b)], axis=-1)
        picked = [both[..., selector >> 4 * i & 7] for i in range(4)]
        return lax.bitcast_convert_type(jnp.stack(picked, axis=-1), jnp.int32)
    return _asm(f"prmt.b32 $0, $1, $2, {selector};", a, b)


def merge_bits(a: jax.Array, b: jax.Array, mask: jax.Array | int, *, interpret: bool) -> jax.Array:
    """int32: a's bits where those of `mask` are set, else b's, in one instruction."""
    if interpret:
        return (a & mask) | (b & ~mask)
    if isinstance(mask, int):  # the compiler would take a mask and its complement for two constants, and use two
        return _asm(f"lop3.b32 $0, $1, $2, {mask}, 0xE4;", a, b)
    return _asm("lop3.b32 $0, $1, $2, $3, 0xE4;", a, b, mask)


def as_words(x: jax.Array, *, interpret: bool) -> jax.Array:
    """int32 words of two neighbouring int16 each, the lower index in the low half: [..., n] -> [..., n / 2]."""
    if interpret:
        low, high = x[..., 0::2].astype(jnp.int32), x[..., 1::2].astype(jnp.int32)
        return (low & 0xFFFF) | (high << 16)
    # a pair comes in one register, and goes to both of its places
    words = assembly("mov.b32 $0, $2; mov.b32 $1, $2;", [x], "=r,=r,r", pack=2)
    return split(words.reshape(*x.shape[:-1], -1, 2))[0]


def from_neighbour(x: jax.Array, *, interpret: bool) -> jax.Array:
    """int32 x of the thread beside: 0 and 1 exchange theirs, 2 and 3, and so on; one element per thread, in order."""
    if interpret:
        # by a sort, since XLA would fuse anything simpler with all that came before, and take seconds to compile it
        return lax.sort_key_val(jnp.arange(x.shape[0]) ^ 1, x)[1]
    return _asm("shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", x)


def shared_buffer(words: int, lane: jax.Array, *, interpret: bool) -> Memory:
    """A buffer of 32-bit words in shared memory, holding anything; the arguments are those of `shared_zeros`."""
    if words * 4 > SHARED_BYTES:
        raise ValueError(f"{words=} must be at most {SHARED_BYTES // 4}")
    if interpret:
        return jnp.full(2 * words, 0x7FC1, jnp.int16)  # NaN of either 16-bit dtype
    return _asm(f"{{ .shared .align 16 .b8 buffer[{words * 4}]; mov.u32 $0, buffer; }}", lane)


def shared_append(
    memory: Memory, offset: jax.Array, words: Sequence[jax.Array], kept: jax.Array, *, interpret: bool
) -> Memory:
    """Write those halves of 16 int32 words whose bit of int32 `kept` is set, lowest first, from `offset` on, dense.

    Word i holds the 16-bit values of bits 2 i and 2 i + 1; offsets are multiples of 2.
    """
    if interpret:
        halves = jnp.stack([half for word in words for half in as_dtype_pairs(word, jnp.int16)])
        is_kept = (kept >> jnp.arange(32, dtype=jnp.int32)[:, None] & 1).astype(bool)
        place = offset // 2 + jnp.cumsum(is_kept, axis=0) - 1
        return memory.at[jnp.where(is_kept, place, memory.size)].set(halves, mode="drop")
    code = ["{ .reg .pred p; .reg .b16 h<2>; .reg .b32 a, bit; mov.b32 a, $2;"]
    for i in range(len(words)):
        code.append(f"mov.b32 {{h0, h1}}, ${4 + i};")
        for half in range(2):
            code.append(f"and.b32 bit, $3, {1 << 2 * i + half:#x}; setp.ne.b32 p, bit, 0;")
            code.append(f"@p st.shared.b16 [a], h{half}; @p add.u32 a, a, 2;")
    code.append("mov.b32 $0, $1; }")
    return _asm(" ".join(code), memory, offset, kept, *words)


def shared_zeros(words: int, lane: jax.Array, *, interpret: bool) -> Memory:
    """A zeroed buffer of 32-bit words in shared memory, a multiple of the block's threads.

    Args:
        words: its size.
        lane: arange of the block's threads, as a flat int32 array; every access has one element per thread.
        interpret: see the module.
    """
    if words * 4 > SHARED_BYTES or words % lane.size:
        raise ValueError(f"{words=} must be a multiple of {lane.size}, and at most {SHARED_BYTES // 4}")
    if interpret:
        return jnp.zeros(2 * words, jnp.int16)
    address = _asm(f"{{ .shared .align 16 .b8 tile[{words * 4}]; mov.u32 $0, tile; }}", lane)
    clear = " ".join(f"st.shared.b32 [a + {4 * start}], 0;" for start in range(0, words, lane.size))
    cleared = _asm(f"{{ .reg .b32 a; shl.b32 a, $2, 2; add.u32 a, a, $1; {clear} mov.b32 $0, $1; }}", address, lane)
    return synchronise(cleared, interpret=interpret)


def shared_offset(memory: Memory, offset: jax.Array, *, interpret: bool) -> jax.Array:
    """Byte offsets in the buffer as the accesses take them: compiled, addresses."""
    return offset if interpret else memory + offset


def shared_store_half(
    memory: Memory, offset: jax.Array, word: jax.Array, half: int, where: jax.Array, *, interpret: bool
) -> Memory:
    """Write the low (0) or high (1) half of int32 words at offsets, multiples of 2, where int32 `where` is not 0."""
    if interpret:
        place = jnp.where(where != 0, offset // 2, memory.size)
        return memory.at[place].set((word >> np.int32(16 * half)).astype(jnp.int16), mode="drop")
    code = f"setp.ne.u32 p, $4, 0; mov.b32 {{h0, h1}}, $3; @p st.shared.b16 [$2], h{half}; mov.b32 $0, $1;"
    return _asm(f"{{ .reg .pred p; .reg .b16 h0, h1; {code} }}", memory, offset, word, where)


def shared_store_word(memory: Memory, offset: jax.Array, constant: int, value: jax.Array, *, interpret: bool) -> Memory:
    """Write int32 words at `offset + constant`, multiples of 4."""
    if interpret:
        place = (offset + constant) // 2
        low, high = value.astype(jnp.int16), lax.shift_right_logical(value, np.int32(16)).astype(jnp.int16)
        return memory.at[place].set(low).at[place + 1].set(high)
    return _asm(f"st.shared.b32 [$2 + {constant}], $3; mov.b32 $0, $1;", memory, offset, value)


def shared_load(memory: Memory, offset: jax.Array, constant: int, *, clear: bool = True, interpret: bool) -> jax.Array:
    """Read int32 words at `offset + constant`, multiples of 4, and clear them if asked to.

    Interpreted, the clearing happens in `synchronise`: every word must be read before it, by exactly one lane.
    """
    if interpret:
        place = (offset + constant) // 2
        low, high = memory[place].astype(jnp.int32), memory[place + 1].astype(jnp.int32)
        return (low & 0xFFFF) | (high << 16)
    code = f"ld.shared.b32 $0, [$2 + {constant}];" + (f" st.shared.b32 [$2 + {constant}], 0;" if clear else "")
    return _asm(code, memory, offset, constraints="=&r,r,r")


def synchronise(memory: Memory, read: Sequence[jax.Array] = (), *, interpret: bool) -> Memory:
    """Wait for the block's threads; what was `read` (by `shared_load`, which clears) was read before."""
    if interpret:
        return jnp.zeros_like(memory) if read else memory
    return _asm("bar.sync 0; mov.b32 $0, $1;", memory, *read)


def assembly(
    code: str, args: Sequence[jax.Array], constraints: str, *, dtype: Any = jnp.int32, pack: int = 1
) -> jax.Array:
    """Inline assembly on operands of one shape, `pack` neighbours at a time; an array of that shape.

    Args:
        code: PTX; `pack` results are $0, $1, ..., then come each operand's.
        args: the operands.
        constraints: of all of these, as LLVM has them: "=r", or "=f" for float32, of results; "r", "f" of operands.
        dtype: of the results.
        pack: how many neighbours, which the compiler must have left in one thread.
    """
    [result] = plgpu.elementwise_inline_asm(
        code,
        args=args,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result


def _asm(code: str, *args: jax.Array, constraints: str | None = None) -> jax.Array:
    """The same of int32, one element at a time."""
    return assembly(code, args, constraints or ",".join(["=r"] + ["r"] * len(args)))
