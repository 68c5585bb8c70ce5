"""The way out: kept entries appended in shared memory, scaled, and written in the interleaved order."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.layout import WORD
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.prune_pack.program import (
    BLOCK,
    THREAD_WORDS,
    Plan,
    floats,
    fused,
    lane,
    part_of,
    token_of,
    words_of,
)


def store_bitmap(ref: tl.Ref, mask: list[jax.Array], row: jax.Array, plan: Plan) -> None:
    """Write the threads' bitmap words; `row` is the block's first one."""
    word = (row + token_of(plan)) * (plan.head_dim // WORD) + part_of(plan)
    for i, bits in enumerate(mask):
        tl.store(ref.at[word + i * plan.parts], bits.astype(jnp.uint32))


def clear_block(bitmap_ref: tl.Ref, values_ref: tl.Ref, row: jax.Array, plan: Plan) -> None:
    """Write empty rows over the block's."""
    store_bitmap(bitmap_ref, [jnp.zeros(plan.threads, jnp.int32)] * THREAD_WORDS, row, plan)
    for place, is_piece in _pieces(plan):
        _store_piece(values_ref, jnp.zeros((plan.threads, plan.chunk // 2), jnp.int32), row, place, is_piece, plan)


def append(
    columns: list[list[jax.Array]], memory: tl.Memory, token_row: jax.Array, part: jax.Array, plan: Plan
) -> tl.Memory:
    """The kept entries of each token in shared memory, one behind the other.

    Args:
        columns: a thread's entries, and its bitmap words.
        memory: which has a row for each token.
        token_row: where that of the thread's token begins.
        part: see `part_of`.
        plan: of the kernel.
    """
    *entries, mask = columns
    mask = mask[:THREAD_WORDS]
    counts = [lax.population_count(bits) for bits in mask]
    ranks = [jnp.zeros_like(counts[0]), counts[0]]
    if plan.parts == 2:  # the order of the words: 0 here, 0 beside, 1 here, 1 beside
        beside = tl.from_neighbour(counts[0], interpret=plan.interpret)
        is_second = -part
        ranks = [beside & is_second, counts[0] + beside + (plan.kept - counts[0] - beside - counts[1] & is_second)]
    words = [word for words in entries for word in words]
    for i, (rank, bits) in enumerate(zip(ranks, mask, strict=True)):
        some = words[i * WORD // 2 : (i + 1) * WORD // 2]
        memory = tl.shared_append(memory, token_row + 2 * rank, some, bits, interpret=plan.interpret)
    return tl.synchronise(memory, interpret=plan.interpret)


def put_factor(
    columns: list[list[jax.Array]], memory: tl.Memory, token_row: jax.Array, part: jax.Array, plan: Plan
) -> tl.Memory:
    """Put what a token's kept entries are to be scaled by behind them in shared memory; 0 where they stay as they are.

    See `rescale_to_norm`. The norm of what is kept is taken from there, which is less than all. Arguments as `append`.
    """
    share = plan.kept // 2 // plan.parts
    load = functools.partial(tl.shared_load, memory, clear=False, interpret=plan.interpret)
    held = [load(token_row + 4 * share * part, constant=4 * i) for i in range(share)]
    whole, kept = (_norm(words, plan) for words in ([word for words in columns for word in words], held))
    usable = (kept > 0) & (whole < jnp.inf)
    factor = jnp.where(usable, whole / jnp.where(usable, kept, 1.0), 0.0)
    bits = lax.bitcast_convert_type(factor, jnp.int32)
    memory = tl.shared_store_word(memory, token_row, 2 * plan.kept, bits, interpret=plan.interpret)
    return tl.synchronise(memory, interpret=plan.interpret)


def _norm(words: list[jax.Array], plan: Plan) -> jax.Array:
    """The L2 norm of the entries that a token's threads hold."""
    total = functools.reduce(jnp.add, (x * x for x in floats(words, plan)))
    if plan.parts == 2:
        beside = tl.from_neighbour(lax.bitcast_convert_type(total, jnp.int32), interpret=plan.interpret)
        total += lax.bitcast_convert_type(beside, jnp.float32)
    return jnp.sqrt(total)


def store_values(ref: tl.Ref, memory: tl.Memory, row: jax.Array, plan: Plan) -> None:
    """Move a block of values from shared memory to its place."""
    for place, is_piece in _pieces(plan):
        token, chunk = place % BLOCK, jnp.where(is_piece, place // BLOCK, 0)
        start = tl.shared_offset(memory, token * np.int32(4 * plan.row_words), interpret=plan.interpret)
        first = start + chunk * np.int32(2 * plan.chunk)
        places = range(0, 2 * plan.chunk, 4)
        words = tl.stack([fused(plan, _pair, [], memory, start, first, place=place) for place in places])
        _store_piece(ref, words, row, place, is_piece, plan)


def _pair(
    _: Any, memory: tl.Memory, token_row: jax.Array, chunk_start: jax.Array, *, place: int, plan: Plan
) -> jax.Array:
    """Two slots of a chunk, `place` bytes from its start in the memory, scaled by the factor in their token's row."""
    load = functools.partial(tl.shared_load, memory, clear=False, interpret=plan.interpret)
    word = load(chunk_start, constant=place)
    if plan.rescale:
        factor = lax.bitcast_convert_type(load(token_row, constant=2 * plan.kept), jnp.float32)
        word = _scale(word, factor, plan)
    return word


def _scale(word: jax.Array, factor: jax.Array, plan: Plan) -> jax.Array:
    limit = float(jnp.finfo(plan.dtype).max)
    [scaled] = words_of([jnp.clip(x * factor, -limit, limit) for x in floats([word], plan)], plan)
    return jnp.where(factor > 0, scaled, word)


def _pieces(plan: Plan) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The chunks of a block of values, one per thread at a time: place, and whether there is one."""
    pieces = BLOCK * plan.kept // plan.chunk
    for start in range(0, pieces, plan.threads):
        place = start + lane(plan)
        yield place, place < pieces


def _store_piece(
    ref: tl.Ref, words: jax.Array, row: jax.Array, place: jax.Array, is_piece: jax.Array, plan: Plan
) -> None:
    """Store a chunk of slots, as words [threads, chunk / 2], at its place within the block of values."""
    halves = jnp.stack(tl.as_dtype_pairs(words, jnp.int16), axis=-1).reshape(-1, plan.chunk)
    slot = jnp.arange(plan.chunk, dtype=jnp.int32)[None, :]
    where = (row * plan.kept + place * plan.chunk)[:, None] + slot
    tl.store(ref.at[where], halves, mask=jnp.broadcast_to(is_piece[:, None], where.shape))
