"""Pallas's Mosaic GPU backend: the one module that imports it, and what it cannot run.

A kernel here is a function of a `warp.Warp`, global arrays and the address of shared memory. Unlike Triton's, its
threads have shared memory with addresses, registers and barriers of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from mustafar_jax.pallas_kernels import cuda
from mustafar_jax.pallas_kernels.mosaic import ptx, simt
from mustafar_jax.sharding import outputs_as, varying_as

COMPUTE_CAPABILITY = 9.0
SHARED_BYTES = 227 * 1024
"""Shared memory that a block on Hopper may have."""
WARPGROUP = 4
"""Warps that blocks are made of."""

Body = Callable[..., None]
"""body(warp, shared, *inputs, *outputs): shared the address of shared memory, the others as `Warp.row` takes them."""


def why_not(*, dtype: Any, head_dim: int, queries_per_head: int) -> str | None:
    """Why these kernels cannot run something, in words, or None: see `cuda.why_not`."""
    return cuda.why_not(
        "Mosaic GPU", _runs_on, "9.0", dtype=dtype, head_dim=head_dim, queries_per_head=queries_per_head
    )


def check_supported(*, dtype: Any, head_dim: int, queries_per_head: int) -> None:
    """Raise NotImplementedError where `why_not` has a reason."""
    if reason := why_not(dtype=dtype, head_dim=head_dim, queries_per_head=queries_per_head):
        raise NotImplementedError(reason)


def _runs_on(capability: float) -> bool:
    return capability == COMPUTE_CAPABILITY


def kernel_call(
    body: Body,
    *arguments: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    blocks: int,
    warps: int,
    shared_bytes: int,
    dtype: Any,
    interpret: bool,
    teams: int = 1,
) -> list[jax.Array]:
    """Run a kernel.

    Args:
        body: the kernel; outputs start undefined.
        *arguments: arrays, read as flat bytes.
        out_shape: of the outputs.
        blocks: how many.
        warps: per block, a multiple of 4.
        shared_bytes: per block.
        dtype: of the 16-bit operands.
        interpret: run as numpy, anywhere.
        teams: blocks that are launched as one. How many registers a thread may have follows from the threads of a
            launched block, and from nothing else that Mosaic GPU lets one say.
    """
    if shared_bytes * teams > SHARED_BYTES:
        raise ValueError(
            f"{shared_bytes=} of {warps=}, {teams=} times, must be at most {SHARED_BYTES}; wanted fewer warps"
        )
    if interpret:
        return _interpret(
            body, *arguments, out_shape=out_shape, blocks=blocks, warps=warps, shared_bytes=shared_bytes, dtype=dtype
        )
    arguments = varying_as(arguments, arguments)
    out_shape = outputs_as(out_shape, *arguments)
    count = len(arguments) + len(out_shape)

    def kernel(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (count + 1))
        def emit(_context: Any, *memrefs: ir.Value) -> None:
            *global_arrays, shared = memrefs
            wide, word = ir.IntegerType.get_signless(64), ir.IntegerType.get_signless(32)
            pointers = [llvm.ptrtoint(wide, mgpu_utils.memref_ptr(x)) for x in global_arrays]
            warp = ptx.Warp(dtype, ptx.Teams(teams, warps, blocks) if teams > 1 else None)
            memory = ptx.Register(llvm.ptrtoint(word, mgpu_utils.memref_ptr(shared)))
            body(warp, ptx.memory_of(warp, memory, shared_bytes), *pointers)

        emit(*refs)

    call = plgpu.kernel(
        kernel,
        out_type=list(out_shape),
        scratch_types=[plgpu.SMEM((teams * shared_bytes // 4,), jnp.uint32)],
        grid=(-(-blocks // teams),),
        grid_names=("block",),
        num_threads=teams * warps // WARPGROUP,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    first, *rest = arguments
    return call(cuda.only(first, kernels="Mosaic GPU"), *rest)


def _interpret(
    body: Body, *arguments: jax.Array, out_shape: Sequence[jax.ShapeDtypeStruct], **options: Any
) -> list[jax.Array]:
    """`kernel_call` on numpy arrays."""

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        inputs = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in map(np.asarray, arrays)]
        outputs = [np.full(x.size * x.dtype.itemsize, 0xFF, np.uint8) for x in out_shape]

        def kernel(warp: simt.Warp) -> None:
            body(warp, warp.integer(0), *inputs, *outputs)

        simt.run(kernel, **options)
        return [x.view(shape.dtype).reshape(shape.shape) for x, shape in zip(outputs, out_shape, strict=True)]

    return jax.pure_callback(call, list(out_shape), *arguments)
