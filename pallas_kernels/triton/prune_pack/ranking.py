"""What is held of a token's entries, and what they are compared by: less the mean key, times the weights."""

import jax
import jax.numpy as jnp

from mustafar_jax.layout import WORD
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.prune_pack.mean import less_mean, put_mean
from mustafar_jax.pallas_kernels.triton.prune_pack.program import (
    THREAD_WORDS,
    Plan,
    four_of,
    fused,
    part_of,
    token_of,
    words_of,
)


def load_entries(ref: tl.Ref, first: jax.Array, plan: Plan) -> list[jax.Array]:
    """A thread's entries, eights of channels: int32 [threads, 4] of two neighbours each; four eights a bitmap word."""
    row = (first + token_of(plan))[:, None]
    eights = (word * plan.head_dim // 2 + start for word in range(THREAD_WORDS) for start in range(0, WORD, 8))
    channel = (part_of(plan) * WORD)[:, None] + jnp.arange(8, dtype=jnp.int32)[None, :]
    loaded = (tl.load(ref.at[row, channel + eight]) for eight in eights)
    return [tl.as_words(x, interpret=plan.interpret) for x in loaded]


def held_and_ranked(
    memory: tl.Memory,
    entries: list[jax.Array],
    mean_refs: tuple[tl.Ref, ...],
    weight_ref: tl.Ref | None,
    row: jax.Array,
    plan: Plan,
) -> tuple[tl.Memory, list[jax.Array], list[jax.Array]]:
    """The entries to hold, less the mean key rotated to each token's position; and what they are compared by."""
    if not (mean_refs or plan.weighed):
        return memory, entries, entries
    if mean_refs:
        memory = put_mean(memory, mean_refs, row, plan)
    held, ranked = list(entries), list(entries)
    for eight in range(WORD // 8):  # of pairs of channels; one after the other, so that few numbers are held at a time
        both = eight, eight + WORD // 8  # the pairs' first channels and their second ones
        words = [entries[i] for i in both]
        numbers = less_mean(memory, words, mean_refs[-1], eight, plan) if mean_refs else _numbers(words, plan)
        for i, fours in zip(both, numbers, strict=True):
            if mean_refs:
                held[i] = ranked[i] = fused(plan, _rounded, fours)
            if weight_ref is not None:
                ranked[i] = _weighed(fours, weight_ref, i, plan)

    return fused(plan, _wait, held, memory) if mean_refs else memory, held, ranked


def _wait(columns: list[list[jax.Array]], memory: tl.Memory, plan: Plan) -> tl.Memory:
    """Until the mean key in shared memory has been read for all that is held."""
    return tl.synchronise(memory, [words[0] for words in columns], interpret=plan.interpret)


def _numbers(eights: list[jax.Array], plan: Plan) -> list[list[jax.Array]]:
    """Words of eight entries each as float32 [threads, 4], two for each of them."""
    return [[fused(plan, four_of, [words], four=four) for four in range(2)] for words in eights]


def _weighed(fours: list[jax.Array], ref: tl.Ref, eight: int, plan: Plan) -> jax.Array:
    """Words of eight numbers times the weights [H] of their channels; `eight` counts them in `load_entries`'s order."""
    word, start = divmod(8 * eight, WORD)
    channel = (part_of(plan) * WORD)[:, None] + word * plan.head_dim // 2 + start + jnp.arange(4, dtype=jnp.int32)[None]
    weights = [tl.load(ref.at[channel + 4 * four]) for four in range(2)]
    return fused(plan, _weigh, [*fours, *weights])


def _weigh(columns: list[list[jax.Array]], plan: Plan) -> list[jax.Array]:
    """Words of eight numbers, in two fours, times as many weights."""
    fours, weights = columns[:2], columns[2:]
    weighed = [[x * weight for x, weight in zip(*pair, strict=True)] for pair in zip(fours, weights, strict=True)]
    return _rounded(weighed, plan)


def _rounded(columns: list[list[jax.Array]], plan: Plan) -> list[jax.Array]:
    """Words of eight numbers, in two fours."""
    return words_of(columns[0] + columns[1], plan)
