"""The mean key, rotated to each token's position and taken off its entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.layout import WORD
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.prune_pack.program import BLOCK, Plan, four_of, fused, lane, of_head, part_of
from mustafar_jax.pallas_kernels.triton.tile import rotate_pair


def mean_operands(mean: Mean | None) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """What is read of a mean: keys [H], the frequencies [H / 2], and cos and sin of a block's angles.

    The last, which `_turns` reads, is [2, 8, threads, 4], so that threads side by side read what stands side by side.
    It is a constant, which a decode step need not compute.
    """
    if mean is None:
        return []
    angle = mean.places(np.arange(BLOCK)).astype(np.float32) * mean.inv_freq  # [tokens, pairs]
    angle = angle.reshape(BLOCK, -1, 8, 4).transpose(2, 0, 1, 3).reshape(8, -1, 4)
    whole = [jnp.asarray(x) for x in (mean.inv_freq, np.stack([np.cos(angle), np.sin(angle)]))]
    return [of_head(mean.key), *((x, pl.BlockSpec(x.shape, lambda *_, zeros=(0,) * x.ndim: zeros)) for x in whole)]


def put_mean(memory: tl.Memory, refs: tuple[tl.Ref, ...], row: jax.Array, plan: Plan) -> tl.Memory:
    """Put the mean key, rotated to the position of the block's first token, into shared memory, by pair of channels.

    R_{s + j} m = R_j R_s m: a thread rotates one pair of channels to the position s of the block's first token, and
    hands it on through shared memory; a table holds the turn from there to token j.
    """
    mean_ref, inv_freq_ref, _ = refs
    assert plan.offset is not None
    pair, half = lane(plan), plan.head_dim // 2
    angle = (row + plan.offset).astype(jnp.float32) * inv_freq_ref[pair]
    start = rotate_pair(mean_ref[pair], mean_ref[pair + half], jnp.cos(angle), jnp.sin(angle))
    place = tl.shared_offset(memory, 4 * pair, interpret=plan.interpret)
    for i, x in enumerate(start):
        bits = lax.bitcast_convert_type(x, jnp.int32)
        memory = tl.shared_store_word(memory, place, 4 * half * i, bits, interpret=plan.interpret)
    return tl.synchronise(memory, interpret=plan.interpret)


def less_mean(
    memory: tl.Memory, eights: list[jax.Array], turn_ref: tl.Ref, eight: int, plan: Plan
) -> list[list[jax.Array]]:
    """The same of either half of eight pairs of channels, less the mean key rotated to each token's position.

    Both halves' numbers are not rounded yet. They share what is loaded: a quad, four of the pairs, is read at a time.
    """
    place = tl.shared_offset(memory, 4 * WORD * part_of(plan), interpret=plan.interpret)
    numbers: list[list[jax.Array]] = [[], []]
    for quad in (2 * eight, 2 * eight + 1):
        turns = _turns(turn_ref, quad, plan)
        for half, words in enumerate(eights):
            four = fused(plan, _four_less_mean, [words, *turns], memory, place, quad=quad, half=half)
            numbers[half].append(four)
    return numbers


def _four_less_mean(
    columns: list[list[jax.Array]],
    memory: tl.Memory,
    place: jax.Array,
    *,
    quad: int,
    half: int,
    plan: Plan,
) -> list[jax.Array]:
    """Four entries less the mean key's: those of four pairs of channels, each pair's first half or second.

    Args:
        columns: the eight entries that have these four, then cos and sin as `_turns` gives them.
        memory: where `put_mean` put the mean key.
        place: where in there that of a thread's channels begins.
        quad: which four of the thread's pairs.
        half: which of a pair's two channels.
        plan: of the kernel.
    """
    load = functools.partial(tl.shared_load, memory, place, clear=False, interpret=plan.interpret)
    less, entries = [], four_of(columns, four=quad % 2, plan=plan)
    for i, (x, *turn) in enumerate(zip(entries, *columns[1:], strict=True), 4 * quad):
        pair = (load(constant=4 * i), load(constant=4 * i + 2 * plan.head_dim))
        start = (lax.bitcast_convert_type(bits, jnp.float32) for bits in pair)
        less.append(x - rotate_pair(*start, *turn)[half])
    return less


def _turns(ref: tl.Ref, quad: int, plan: Plan) -> list[jax.Array]:
    """Cos and sin [threads, 4] of the angles from the block's first token to a thread's own, four pairs of channels."""
    where = lane(plan)[:, None], jnp.arange(4, dtype=jnp.int32)[None, :]
    return [tl.load(ref.at[i, quad, *where]) for i in range(2)]
