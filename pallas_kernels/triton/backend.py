"""What the Triton kernels do for the library, and what they cannot."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mustafar_jax.backend import Attended, Backend, Operation, missing_from_jax
from mustafar_jax.codecs import ScaledCodec
from mustafar_jax.operands import Mean, PackedAttention, Packing, Product, Side
from mustafar_jax.pruning import keep_count, magnitude
from mustafar_jax.rows import Rows
from mustafar_jax.writes import write_rows

# The kernels are imported where they are used: Pallas takes a while to import, and a version of jax may lack a part.


def _why_not_here() -> str | None:
    return missing_from_jax("jax.experimental.pallas.triton")


def _why_not_attend(operands: PackedAttention) -> str | None:
    if reason := _why_not_here():
        return reason
    from mustafar_jax.pallas_kernels.rows import why_not_attend
    from mustafar_jax.pallas_kernels.triton import codes, language
    from mustafar_jax.pallas_kernels.triton.decode_attention import why_not_rows

    reason = _why_not_mean(operands.mean) or why_not_attend(operands, language.why_not, codes.WHOLE, codes.WHOLE)
    return reason or why_not_rows(operands.key, operands.value)


def _why_not_mean(mean: Mean | None) -> str | None:
    if mean is not None and mean.dealt.count > 1:
        return (
            f"the Triton kernels rotate the mean to rows that follow each other; got rows dealt to {mean.dealt.count}"
        )
    return None


def attend(operands: PackedAttention, *, interpret: bool = False) -> Attended:
    """Attend a packed cache; `interpret` runs the kernels as plain JAX, anywhere."""
    from mustafar_jax.pallas_kernels.rows import by_queries
    from mustafar_jax.pallas_kernels.triton.decode_attention import decode_attention

    return by_queries(functools.partial(decode_attention, interpret=interpret), operands)


def _why_not_pack(packing: Packing) -> str | None:
    if reason := _why_not_here():
        return reason
    from mustafar_jax.pallas_kernels.triton import language

    for side in packing.sides:
        if reason := _why_not_pack_side(side):
            return reason
    if all(_is_array(side.target) for side in packing.sides):
        return "the Triton kernels write codes and rows with a bitmap; this cache has neither"
    source = packing.key.source
    return language.why_not(dtype=source.dtype, head_dim=source.shape[3])


def _why_not_pack_side(side: Side) -> str | None:
    target = side.target
    if reason := _why_not_mean(side.mean):
        return reason
    if not (target.is_plain or isinstance(target.codec, ScaledCodec)):
        return f"the Triton kernels pack plain numbers and codes with one scale a row; got {target.codec.name}"
    if side.format.slots is not None and side.method.mask is not magnitude:
        return f"the Triton kernels prune by magnitude; got {side.rule!r}"
    if side.rescale and side.format.slots is not None and not target.is_plain:
        return f"the Triton kernels do not rescale what they code; got {target.codec.name} behind a bitmap"
    return None


def _is_array(target: Rows) -> bool:
    """Whether rows are plain numbers of every entry, an ordinary array."""
    return target.is_plain and target.bitmap is None


def pack(packing: Packing, *, interpret: bool = False) -> tuple[Rows, Rows]:
    """In one pass for what is plain and one for codes, in which sequences that have nothing to pack cost nothing."""
    from mustafar_jax.pallas_kernels.triton.code_pack import Code, code_pack
    from mustafar_jax.pallas_kernels.triton.prune_pack import Prune, prune_pack

    def code(side: Side) -> Code:
        kept, weight = keep_count(side.target.head_dim, side.sparsity), side.weight
        weight = None if side.format.slots is None else weight
        return Code(side.source, side.target, kept, side.mean, weight, side.turn)

    def prune(side: Side) -> Prune:
        return Prune(side.source, side.target, side.mean, side.rescale, side.weight)

    ranges, (rows, axis) = (packing.first, packing.start, packing.held), (packing.rows, packing.head_axis)
    codes = [code(side) for side in packing.sides if not side.target.is_plain]
    prunes = [prune(side) for side in packing.sides if side.target.is_plain and side.target.bitmap is not None]
    coded = iter(code_pack(codes, *ranges, rows=rows, head_axis=axis, interpret=interpret) if codes else [])
    pruned = iter(prune_pack(prunes, *ranges, rows=rows, head_axis=axis, interpret=interpret) if prunes else [])

    def place(side: Side) -> Rows:
        if not _is_array(side.target):
            return next(pruned if side.target.is_plain else coded)
        payload = write_rows(side.target.payload, packing.taken(side.source), packing.start, packing.count, axis=2)
        return dataclasses.replace(side.target, payload=payload)

    return place(packing.key), place(packing.value)


def _why_not_multiply(product: Product) -> str | None:
    if reason := _why_not_here():
        return reason
    from mustafar_jax.pallas_kernels.triton import spmv

    return spmv.why_not(product.x.dtype, product.rows)


def multiply(product: Product, *, interpret: bool = False) -> jax.Array:
    """Multiply with rows, any axes before them."""
    from mustafar_jax.pallas_kernels.triton import spmv

    rows, leading = product.rows, product.rows.leading
    by_head = jax.tree.map(lambda leaf: leaf.reshape(-1, 1, *leaf.shape[len(leading) :]), rows)
    x = product.x.reshape(-1, 1, *product.x.shape[-2:])
    if product.what == "scores":
        out = spmv.key_spmv(x, by_head, interpret=interpret)[..., : rows.length]
    else:
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, rows.padded_length - rows.length)])
        out = spmv.value_spmv(x, by_head, interpret=interpret)
    return out.reshape(*leading, *out.shape[-2:])


TRITON = Backend(
    name="triton",
    needs_cuda=True,
    attend_packed=Operation(attend, _why_not_attend),
    pack=Operation(pack, _why_not_pack),
    multiply=Operation(multiply, _why_not_multiply),
)
