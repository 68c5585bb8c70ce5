"""The kernel, and how it is called."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.layout import WORD
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.prune_pack.mean import mean_operands
from mustafar_jax.pallas_kernels.triton.prune_pack.program import (
    BLOCK,
    THREAD_WORDS,
    Plan,
    Prune,
    fused,
    lane,
    of_head,
    part_of,
    token_of,
)
from mustafar_jax.pallas_kernels.triton.prune_pack.ranking import held_and_ranked, load_entries
from mustafar_jax.pallas_kernels.triton.prune_pack.selection import largest
from mustafar_jax.pallas_kernels.triton.prune_pack.storing import (
    append,
    clear_block,
    put_factor,
    store_bitmap,
    store_values,
)
from mustafar_jax.rows import Rows


def prune_pack(
    prunes: Sequence[Prune],
    first: jax.Array,
    start: jax.Array,
    held: jax.Array,
    *,
    rows: int,
    head_axis: int,
    interpret: bool = False,
) -> list[Rows]:
    """Prune consecutive rows of each sequence to their largest magnitudes, and write them into packed rows.

    Source rows first .. first + rows - 1 become target rows start .. start + rows - 1. The entries that are kept, and
    their order among equals, are those of `magnitude_mask`.

    Args:
        prunes: keys, values or both; all of one shape of source, each target of the source's dtype.
        first: int32 [B].
        start: int32 [B], multiples of 32; a sequence whose start is at the target's end or beyond is left as it is.
        held: int32 [B], multiples of 32: of the rows, those from here on are overwritten with empty ones.
        rows: a multiple of 32.
        head_axis: the axis of the sources' heads: 2 in [B, S, K, H], 1 in [B, K, S, H].
        interpret: run as plain JAX, anywhere.

    Returns:
        The targets with the rows in them: the same buffers, where they are donated.

    Raises:
        NotImplementedError: see `language.check_supported`.
        ValueError: rows that are no multiple of 32, sources of several shapes, a target of another dtype than its
            source's, a weight that is not float32 [B, K, H].
    """
    source = prunes[0].source
    batch, head_dim = source.shape[0], source.shape[3]
    kv_heads = source.shape[head_axis]
    tl.check_supported(dtype=source.dtype, head_dim=head_dim)
    if rows % BLOCK:
        raise ValueError(f"{rows=} must be a multiple of {BLOCK}")
    for prune in prunes:
        _check(prune, source, (batch, kv_heads, head_dim))
    plans = tuple(Plan.of(prune, interpret) for prune in prunes)
    # not stacked: that would be a kernel of its own in every decode step
    of_sequence = pl.BlockSpec((None, 1), lambda head, block, sequence, side: (sequence, 0))
    operands = [(x.astype(jnp.int32)[:, None], of_sequence) for x in (first, start, held)]
    targets: list[tuple[jax.Array, pl.BlockSpec]] = []
    aliases: dict[int, int] = {}
    for prune in prunes:
        operands += [of_head(_bits(prune.source), head_axis), *mean_operands(prune.mean)]
        operands += [] if prune.weight is None else [of_head(prune.weight)]
        assert prune.target.bitmap is not None
        for array in (prune.target.bitmap, _bits(prune.target.payload)):
            aliases[len(operands)] = len(targets)
            targets.append(of_head(array.reshape(batch, kv_heads, -1)))
            operands.append(targets[-1])
    outs = tl.pallas_call(
        functools.partial(_kernel, plans=plans),
        name="prune_pack",
        num_warps=plans[0].threads // tl.WARP,
        interpret=interpret,
        grid=(kv_heads, rows // BLOCK, batch, len(prunes)),
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in targets],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array, _ in targets],
        input_output_aliases=aliases,
    )(*(array for array, _ in operands))
    written = []
    for bitmap, payload, prune in zip(outs[0::2], outs[1::2], prunes, strict=True):
        target = prune.target
        bitmap = bitmap.reshape(*target.leading, target.padded_length, target.head_dim // WORD)
        payload = lax.bitcast_convert_type(payload, source.dtype).reshape(target.payload.shape)
        written.append(dataclasses.replace(target, bitmap=bitmap, payload=payload))
    return written


def _bits(x: jax.Array) -> jax.Array:
    """Entries are moved as integers: every NaN stays as it is, also where XLA has no 16-bit floating point."""
    return lax.bitcast_convert_type(x, jnp.int16)


def _check(prune: Prune, source: jax.Array, per_head: tuple[int, int, int]) -> None:
    """Raise ValueError unless arrays are of the first source's shape and dtype, and a weight of float32 `per_head`."""
    own, target, weight = prune.source, prune.target.payload, prune.weight
    if own.shape != source.shape or not own.dtype == target.dtype == source.dtype:
        raise ValueError(
            f"source is {own.dtype}{list(own.shape)} and its target {target.dtype}; "
            f"wanted {source.dtype}{list(source.shape)}, as the first source is"
        )
    if weight is not None and (weight.shape != per_head or weight.dtype != jnp.float32):
        raise ValueError(f"weight is {weight.dtype}{list(weight.shape)}; wanted float32 {list(per_head)}")


def _kernel(
    first_ref: tl.Ref,  # [1]
    start_ref: tl.Ref,  # [1]
    held_ref: tl.Ref,  # [1]
    *refs: tl.Ref,
    plans: tuple[Plan, ...],
) -> None:
    """32 tokens of one head.

    The other refs, for each plan: source [S, H]; with a mean what `mean_operands` says; with a weight that, [H]; the
    target's bitmap and values, which alias the outputs. Then the outputs, for each plan: bitmap [S * H / 32], values
    [S * slots].
    """
    offset = pl.program_id(1) * BLOCK
    first, row, held = first_ref[0] + offset, start_ref[0] + offset, held_ref[0]
    inputs, outputs = iter(refs[: -2 * len(plans)]), iter(refs[-2 * len(plans) :])
    for side, plan in enumerate(plans):
        source_ref = next(inputs)
        mean_refs = tuple(next(inputs) for _ in range(0 if plan.offset is None else 3))
        weight_ref = next(inputs) if plan.weighed else None
        _ = next(inputs), next(inputs)
        targets = next(outputs), next(outputs)
        is_meant = (pl.program_id(3) == side) & (row < plan.rows)
        prune = functools.partial(_prune_block, source_ref, mean_refs, weight_ref, *targets, first, row, plan)
        pl.when(is_meant & (offset < held))(prune)
        pl.when(is_meant & (offset >= held))(functools.partial(clear_block, *targets, row, plan))


def _prune_block(
    source_ref: tl.Ref,
    mean_refs: tuple[tl.Ref, ...],
    weight_ref: tl.Ref | None,
    bitmap_ref: tl.Ref,
    values_ref: tl.Ref,
    first: jax.Array,
    row: jax.Array,
    plan: Plan,
) -> None:
    words = max(BLOCK * plan.row_words, plan.head_dim)  # room for the block's kept entries, and for a mean key
    memory = tl.shared_buffer(words, lane(plan), interpret=plan.interpret)
    entries = load_entries(source_ref, first, plan)
    memory, entries, ranked = held_and_ranked(memory, entries, mean_refs, weight_ref, row, plan)
    mask = fused(plan, largest, ranked, part_of(plan))
    store_bitmap(bitmap_ref, tl.unstack(mask)[:THREAD_WORDS], row, plan)
    token_row = tl.shared_offset(memory, token_of(plan) * np.int32(4 * plan.row_words), interpret=plan.interpret)
    memory = fused(plan, append, [*entries, mask], memory, token_row, part_of(plan))
    if plan.rescale:
        memory = fused(plan, put_factor, entries, memory, token_row, part_of(plan))
    store_values(values_ref, memory, row, plan)
