"""Prune and pack: from dense keys and values to the packed layout in one pass, written into the cache in place.

A program takes 32 tokens of one head, 64 channels per thread: a thread per token at head_dim 64, two neighbours at 128.
To find a token's largest magnitudes, its 16-bit entries are first transposed to bit planes, words of 32 channels each,
and the planes are walked from the highest bit: of the candidates, those that have the bit are either all kept or all
that remain, which counting them tells. The whole search works on bitmap words, costs the same for all data, and ends
with the bitmap. Entries of equal magnitude are told apart by seven planes more, which hold the channel's number. The
kept entries are then appended in shared memory, and leave it in the interleaved order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax.layout import WORD, chunk
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.fusion import fuse
from mustafar_jax.pallas_kernels.triton.tile import rotate_pair
from mustafar_jax.rows import Rows

_BLOCK = 32
"""Tokens of a program: those that one block of values interleaves."""
_THREAD_WORDS = 2
"""Bitmap words per thread."""


class Prune(NamedTuple):
    """Dense keys or values, and where they go.

    Attributes:
        source: [B, S, K, H], or [B, K, S, H] as `prune_pack` is told.
        target: the plain rows with a bitmap that are overwritten; each keeps as many entries as it has slots.
        mean: where keys are centred, what is taken off them before they are pruned; its `offset` is the position of the
            target's row 0.
        rescale: scale what is kept of a vector to the whole vector's L2 norm.
        weight: float32 [B, K, H], what the entries, or what the mean leaves of them, are multiplied by in float32
            before they are compared in the source's dtype; they are held without it.
    """

    source: jax.Array
    target: Rows
    mean: Mean | None = None
    rescale: bool = False
    weight: jax.Array | None = None


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
    if rows % _BLOCK:
        raise ValueError(f"{rows=} must be a multiple of {_BLOCK}")
    for prune in prunes:
        _check(prune, source, (batch, kv_heads, head_dim))
    plans = tuple(_Plan.of(prune, interpret) for prune in prunes)
    # not stacked: that would be a kernel of its own in every decode step
    of_sequence = pl.BlockSpec((None, 1), lambda head, block, sequence, side: (sequence, 0))
    operands = [(x.astype(jnp.int32)[:, None], of_sequence) for x in (first, start, held)]
    targets: list[tuple[jax.Array, pl.BlockSpec]] = []
    aliases: dict[int, int] = {}
    for prune in prunes:
        operands += [_of_head(_bits(prune.source), head_axis), *_mean_operands(prune.mean)]
        operands += [] if prune.weight is None else [_of_head(prune.weight)]
        assert prune.target.bitmap is not None
        for array in (prune.target.bitmap, _bits(prune.target.payload)):
            aliases[len(operands)] = len(targets)
            targets.append(_of_head(array.reshape(batch, kv_heads, -1)))
            operands.append(targets[-1])
    outs = tl.pallas_call(
        functools.partial(_kernel, plans=plans),
        name="prune_pack",
        num_warps=plans[0].threads // tl.WARP,
        interpret=interpret,
        grid=(kv_heads, rows // _BLOCK, batch, len(prunes)),
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in targets],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array, _ in targets],
        input_output_aliases=aliases,
    )(*(array for array, _ in operands))
    written = []
    for bitmap, payload, prune in zip(outs[0::2], outs[1::2], prunes, strict=True):
        target = prune.target
        bitmap = bitmap.reshape(*target.leading, target.padded_length, -1)
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


def _of_head(array: jax.Array, axis: int = 1) -> tuple[jax.Array, pl.BlockSpec]:
    """An operand [B, ...] with heads along an axis: for each program those of its sequence and head."""
    shape = tuple(None if i in (0, axis) else size for i, size in enumerate(array.shape))

    def place(head: Any, block: Any, sequence: Any, side: Any) -> tuple[Any, ...]:
        return tuple({0: sequence, axis: head}.get(i, 0) for i in range(array.ndim))

    return array, pl.BlockSpec(shape, place)


def _mean_operands(mean: Mean | None) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """What is read of a mean: keys [H], the frequencies [H / 2], and cos and sin of a block's angles.

    The last, which `_turns` reads, is [2, 8, threads, 4], so that threads side by side read what stands side by side.
    Of frequencies that are known it is a constant, which a decode step need not compute.
    """
    if mean is None:
        return []
    numbers: Any = np if isinstance(mean.inv_freq, np.ndarray) else jnp
    by_part = mean.inv_freq.reshape(-1, 8, 4).swapaxes(0, 1)
    angle = (numbers.arange(_BLOCK, dtype=np.float32)[:, None, None] * by_part[:, None]).reshape(8, -1, 4)
    whole = [jnp.asarray(x) for x in (mean.inv_freq, numbers.stack([numbers.cos(angle), numbers.sin(angle)]))]
    return [_of_head(mean.key), *((x, pl.BlockSpec(x.shape, lambda *_, zeros=(0,) * x.ndim: zeros)) for x in whole)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for.

    Attributes:
        head_dim, dtype: of the source.
        kept: entries that a row keeps, its slots.
        rows: of the target.
        offset: the position of the target's row 0, where keys are centred, else None.
        rescale: see `Prune`.
        weighed: whether there is a weight.
        interpret: use the helpers' plain JAX twins.
    """

    head_dim: int
    dtype: Any
    kept: int
    rows: int
    offset: int | None
    rescale: bool
    weighed: bool
    interpret: bool

    @classmethod
    def of(cls, prune: Prune, interpret: bool) -> "_Plan":
        """The plan of one source and target."""
        return cls(
            head_dim=prune.source.shape[3],
            dtype=prune.target.dtype,
            kept=prune.target.slots,
            rows=prune.target.padded_length,
            offset=None if prune.mean is None else prune.mean.offset,
            rescale=prune.rescale,
            weighed=prune.weight is not None,
            interpret=interpret,
        )

    @property
    def parts(self) -> int:
        """Threads per token."""
        return self.head_dim // (WORD * _THREAD_WORDS)

    @property
    def threads(self) -> int:
        """Of a program."""
        return _BLOCK * self.parts

    @property
    def chunk(self) -> int:
        """Slots that stand together in the target."""
        return chunk(self.kept)

    @property
    def row_words(self) -> int:
        """Words from one token to the next in shared memory: odd, so that tokens stand in different banks."""
        return self.kept // 2 + 1


def _kernel(
    first_ref: tl.Ref,  # [1]
    start_ref: tl.Ref,  # [1]
    held_ref: tl.Ref,  # [1]
    *refs: tl.Ref,
    plans: tuple[_Plan, ...],
) -> None:
    """32 tokens of one head.

    The other refs, for each plan: source [S, H]; with a mean what `_mean_operands` says; with a weight that, [H]; the
    target's bitmap and values, which alias the outputs. Then the outputs, for each plan: bitmap [S * H / 32], values
    [S * slots].
    """
    offset = pl.program_id(1) * _BLOCK
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
        pl.when(is_meant & (offset >= held))(functools.partial(_clear_block, *targets, row, plan))


def _prune_block(
    source_ref: tl.Ref,
    mean_refs: tuple[tl.Ref, ...],
    weight_ref: tl.Ref | None,
    bitmap_ref: tl.Ref,
    values_ref: tl.Ref,
    first: jax.Array,
    row: jax.Array,
    plan: _Plan,
) -> None:
    words = max(_BLOCK * plan.row_words, plan.head_dim)  # room for the block's kept entries, and for a mean key
    memory = tl.shared_buffer(words, _lane(plan), interpret=plan.interpret)
    entries = _load(source_ref, first, plan)
    memory, entries, ranked = _held_and_ranked(memory, entries, mean_refs, weight_ref, row, plan)
    mask = _fuse(plan, _largest, ranked, _part(plan))
    _store_bitmap(bitmap_ref, tl.unstack(mask)[:_THREAD_WORDS], row, plan)
    token_row = tl.shared_offset(memory, _token(plan) * np.int32(4 * plan.row_words), interpret=plan.interpret)
    memory = _fuse(plan, _append, [*entries, mask], memory, token_row, _part(plan))
    if plan.rescale:
        memory = _fuse(plan, _put_factor, entries, memory, token_row, _part(plan))
    _store_values(values_ref, memory, row, plan)


def _clear_block(bitmap_ref: tl.Ref, values_ref: tl.Ref, row: jax.Array, plan: _Plan) -> None:
    _store_bitmap(bitmap_ref, [jnp.zeros(plan.threads, jnp.int32)] * _THREAD_WORDS, row, plan)
    for place, is_piece in _pieces(plan):
        _store_piece(values_ref, jnp.zeros((plan.threads, plan.chunk // 2), jnp.int32), row, place, is_piece, plan)


def _fuse(
    plan: _Plan, function: Callable[..., Any], operands: Sequence[jax.Array], *shared: jax.Array, **fixed: int
) -> jax.Array:
    """`fuse` of one of the functions below, which are given the plan and what is `fixed` by their names."""
    return fuse(functools.partial(function, plan=plan, **fixed), operands, *shared, interpret=plan.interpret)


def _lane(plan: _Plan) -> jax.Array:
    return jnp.arange(plan.threads, dtype=jnp.int32)


def _token(plan: _Plan) -> jax.Array:
    return _lane(plan) // plan.parts


def _part(plan: _Plan) -> jax.Array:
    """Which of its token's threads a thread is: it holds bitmap words `part` and `parts + part`."""
    return _lane(plan) % plan.parts


def _load(ref: tl.Ref, first: jax.Array, plan: _Plan) -> list[jax.Array]:
    """A thread's entries, eights of channels: int32 [threads, 4] of two neighbours each; four eights a bitmap word."""
    row = (first + _token(plan))[:, None]
    eights = (word * plan.head_dim // 2 + start for word in range(_THREAD_WORDS) for start in range(0, WORD, 8))
    channel = (_part(plan) * WORD)[:, None] + jnp.arange(8, dtype=jnp.int32)[None, :]
    loaded = (tl.load(ref.at[row, channel + eight]) for eight in eights)
    return [tl.as_words(x, interpret=plan.interpret) for x in loaded]


def _held_and_ranked(
    memory: tl.Memory,
    entries: list[jax.Array],
    mean_refs: tuple[tl.Ref, ...],
    weight_ref: tl.Ref | None,
    row: jax.Array,
    plan: _Plan,
) -> tuple[tl.Memory, list[jax.Array], list[jax.Array]]:
    """The entries to hold, less the mean key rotated to each token's position; and what they are compared by."""
    if not (mean_refs or plan.weighed):
        return memory, entries, entries
    if mean_refs:
        memory = _put_mean(memory, mean_refs, row, plan)
    held, ranked = list(entries), list(entries)
    for eight in range(WORD // 8):  # of pairs of channels; one after the other, so that few numbers are held at a time
        both = eight, eight + WORD // 8  # the pairs' first channels and their second ones
        words = [entries[i] for i in both]
        numbers = _less_mean(memory, words, mean_refs[-1], eight, plan) if mean_refs else _numbers(words, plan)
        for i, fours in zip(both, numbers, strict=True):
            if mean_refs:
                held[i] = ranked[i] = _fuse(plan, _rounded, fours)
            if weight_ref is not None:
                ranked[i] = _weighed(fours, weight_ref, i, plan)

    return _fuse(plan, _wait, held, memory) if mean_refs else memory, held, ranked


def _wait(columns: list[list[jax.Array]], memory: tl.Memory, plan: _Plan) -> tl.Memory:
    """Until the mean key in shared memory has been read for all that is held."""
    return tl.synchronise(memory, [words[0] for words in columns], interpret=plan.interpret)


def _numbers(eights: list[jax.Array], plan: _Plan) -> list[list[jax.Array]]:
    """Words of eight entries each as float32 [threads, 4], two for each of them."""
    return [[_fuse(plan, _four, [words], four=four) for four in range(2)] for words in eights]


def _less_mean(
    memory: tl.Memory, eights: list[jax.Array], turn_ref: tl.Ref, eight: int, plan: _Plan
) -> list[list[jax.Array]]:
    """The same of either half of eight pairs of channels, less the mean key rotated to each token's position.

    Both halves' numbers are not rounded yet. They share what is loaded: a quad, four of the pairs, is read at a time.
    """
    place = tl.shared_offset(memory, 4 * WORD * _part(plan), interpret=plan.interpret)
    numbers: list[list[jax.Array]] = [[], []]
    for quad in (2 * eight, 2 * eight + 1):
        turns = _turns(turn_ref, quad, plan)
        for half, words in enumerate(eights):
            four = _fuse(plan, _four_less_mean, [words, *turns], memory, place, quad=quad, half=half)
            numbers[half].append(four)
    return numbers


def _four(columns: list[list[jax.Array]], *, four: int, plan: _Plan) -> list[jax.Array]:
    """The first or the second four of eight entries."""
    return _floats(columns[0][2 * four : 2 * four + 2], plan)


def _four_less_mean(
    columns: list[list[jax.Array]],
    memory: tl.Memory,
    place: jax.Array,
    *,
    quad: int,
    half: int,
    plan: _Plan,
) -> list[jax.Array]:
    """Four entries less the mean key's: those of four pairs of channels, each pair's first half or second.

    Args:
        columns: the eight entries that have these four, then cos and sin as `_turns` gives them.
        memory: where `_put_mean` put the mean key.
        place: where in there that of a thread's channels begins.
        quad: which four of the thread's pairs.
        half: which of a pair's two channels.
        plan: of the kernel.
    """
    load = functools.partial(tl.shared_load, memory, place, clear=False, interpret=plan.interpret)
    less = []
    for i, (x, *turn) in enumerate(zip(_four(columns, four=quad % 2, plan=plan), *columns[1:], strict=True), 4 * quad):
        pair = (load(constant=4 * i), load(constant=4 * i + 2 * plan.head_dim))
        start = (lax.bitcast_convert_type(bits, jnp.float32) for bits in pair)
        less.append(x - rotate_pair(*start, *turn)[half])
    return less


def _turns(ref: tl.Ref, quad: int, plan: _Plan) -> list[jax.Array]:
    """Cos and sin [threads, 4] of the angles from the block's first token to a thread's own, four pairs of channels."""
    where = _lane(plan)[:, None], jnp.arange(4, dtype=jnp.int32)[None, :]
    return [tl.load(ref.at[i, quad, *where]) for i in range(2)]


def _weighed(fours: list[jax.Array], ref: tl.Ref, eight: int, plan: _Plan) -> jax.Array:
    """Words of eight numbers times the weights [H] of their channels; `eight` counts them in `_load`'s order."""
    word, start = divmod(8 * eight, WORD)
    channel = (_part(plan) * WORD)[:, None] + word * plan.head_dim // 2 + start + jnp.arange(4, dtype=jnp.int32)[None]
    weights = [tl.load(ref.at[channel + 4 * four]) for four in range(2)]
    return _fuse(plan, _weigh, [*fours, *weights])


def _weigh(columns: list[list[jax.Array]], plan: _Plan) -> list[jax.Array]:
    """Words of eight numbers, in two fours, times as many weights."""
    fours, weights = columns[:2], columns[2:]
    weighed = [[x * weight for x, weight in zip(*pair, strict=True)] for pair in zip(fours, weights, strict=True)]
    return _rounded(weighed, plan)


def _rounded(columns: list[list[jax.Array]], plan: _Plan) -> list[jax.Array]:
    """Words of eight numbers, in two fours."""
    return _words(columns[0] + columns[1], plan)


def _put_mean(memory: tl.Memory, refs: tuple[tl.Ref, ...], row: jax.Array, plan: _Plan) -> tl.Memory:
    """Put the mean key, rotated to the position of the block's first token, into shared memory, by pair of channels.

    R_{s + j} m = R_j R_s m: a thread rotates one pair of channels to the position s of the block's first token, and
    hands it on through shared memory; a table holds the turn from there to token j.
    """
    mean_ref, inv_freq_ref, _ = refs
    assert plan.offset is not None
    pair, half = _lane(plan), plan.head_dim // 2
    angle = (row + plan.offset).astype(jnp.float32) * inv_freq_ref[pair]
    start = rotate_pair(mean_ref[pair], mean_ref[pair + half], jnp.cos(angle), jnp.sin(angle))
    place = tl.shared_offset(memory, 4 * pair, interpret=plan.interpret)
    for i, x in enumerate(start):
        bits = lax.bitcast_convert_type(x, jnp.int32)
        memory = tl.shared_store_word(memory, place, 4 * half * i, bits, interpret=plan.interpret)
    return tl.synchronise(memory, interpret=plan.interpret)


def _floats(words: list[jax.Array], plan: _Plan) -> list[jax.Array]:
    """The entries of words, the low and the high one of each, as float32."""
    return [x for word in words for x in tl.float32_pair(word, plan.dtype, interpret=plan.interpret)]


def _words(floats: list[jax.Array], plan: _Plan) -> list[jax.Array]:
    """The inverse of `_floats`."""
    pairs = zip(floats[0::2], floats[1::2], strict=True)
    return [tl.pack_pair(*pair, plan.dtype, interpret=plan.interpret) for pair in pairs]


def _largest(columns: list[list[jax.Array]], part: jax.Array, plan: _Plan) -> list[jax.Array]:
    """The bitmap words of the `kept` largest magnitudes, the lowest channel first among equals.

    They come twice, since a row of four columns is what `fuse` gives for rows of four.

    Args:
        columns: a thread's entries.
        part: see `_part`.
        plan: of the kernel.
    """
    merge = functools.partial(tl.merge_bits, interpret=plan.interpret)
    ahead = [jnp.zeros_like(part)] * _THREAD_WORDS  # kept for sure
    level = [jnp.full_like(part, -1)] * _THREAD_WORDS  # equal to each other in all planes so far
    for plane in _planes([word for words in columns for word in words], part, plan):
        higher = [a | (c & p) for a, c, p in zip(ahead, level, plane, strict=True)]
        count = _sum_over_parts(functools.reduce(jnp.add, map(lax.population_count, higher)), plan)
        enough = plan.kept - 1 - count >> 31  # all ones where the last one that is kept has the plane's bit
        ahead = [merge(a, h, enough) for a, h in zip(ahead, higher, strict=True)]
        level = [c & ~(p ^ enough) for c, p in zip(level, plane, strict=True)]
    return [a | c for a, c in zip(ahead, level, strict=True)] * 2  # one is left in `level`, since all keys differ


def _planes(entries: list[jax.Array], part: jax.Array, plan: _Plan) -> Iterator[list[jax.Array]]:
    """The bits of the entries' keys from the highest: [plane][bitmap word].

    A key is the magnitude's bits, in which all NaN are one value above infinity, then the channel's number, inverted.
    """
    by_word = [_bit_planes(entries[i : i + WORD // 2], plan) for i in (0, WORD // 2)]
    planes = [list(plane) for plane in zip(*by_word, strict=True)]
    mantissa = int(jnp.finfo(plan.dtype).nmant)
    is_nan = [
        functools.reduce(jnp.bitwise_and, word[mantissa:15]) & functools.reduce(jnp.bitwise_or, word[:mantissa])
        for word in by_word
    ]
    yield from reversed(planes[mantissa:15])
    yield is_nan
    for plane in reversed(planes[:mantissa]):
        yield [bits & ~nan for bits, nan in zip(plane, is_nan, strict=True)]
    full, empty = jnp.full_like(is_nan[0], -1), jnp.zeros_like(is_nan[0])
    yield [full, empty]
    if plan.parts == 2:
        yield [part - 1] * _THREAD_WORDS
    for mask in (0x0000FFFF, 0x00FF00FF, 0x0F0F0F0F, 0x33333333, 0x55555555):
        yield [full & mask] * _THREAD_WORDS


def _bit_planes(words: list[jax.Array], plan: _Plan) -> list[jax.Array]:
    """32 entries in 16 words -> 16 words, word b holding the entries' bits b in the channels' order."""
    low: list[jax.Array] = []
    high: list[jax.Array] = []
    pick = functools.partial(tl.permute_bytes, interpret=plan.interpret)
    for a, b, c, d in (words[i::4] for i in range(4)):
        for of_channel in (0x5140, 0x7362):  # two channels' bytes: low, low, high, high
            front, back = pick(a, b, of_channel), pick(c, d, of_channel)
            low.append(pick(front, back, 0x5410))
            high.append(pick(front, back, 0x7632))
    return _transpose_bits(low, plan) + _transpose_bits(high, plan)


def _transpose_bits(words: list[jax.Array], plan: _Plan) -> list[jax.Array]:
    """8 words -> 8 words: bit i of every byte of word j becomes bit j of that byte of word i."""
    words = list(words)
    merge = functools.partial(tl.merge_bits, interpret=plan.interpret)
    for distance, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for i in (i for i in range(8) if not i & distance):
            a, b = words[i], words[i + distance]
            words[i], words[i + distance] = merge(a, b << distance, mask), merge(a >> distance, b, mask)
    return words


def _sum_over_parts(x: jax.Array, plan: _Plan) -> jax.Array:
    """Sums over a token's threads, in each of them."""
    return x if plan.parts == 1 else x + tl.from_neighbour(x, interpret=plan.interpret)


def _store_bitmap(ref: tl.Ref, mask: list[jax.Array], row: jax.Array, plan: _Plan) -> None:
    word = (row + _token(plan)) * (plan.head_dim // WORD) + _part(plan)
    for i, bits in enumerate(mask):
        tl.store(ref.at[word + i * plan.parts], bits.astype(jnp.uint32))


def _append(
    columns: list[list[jax.Array]], memory: tl.Memory, token_row: jax.Array, part: jax.Array, plan: _Plan
) -> tl.Memory:
    """The kept entries of each token in shared memory, one behind the other.

    Args:
        columns: a thread's entries, and its bitmap words.
        memory: which has a row for each token.
        token_row: where that of the thread's token begins.
        part: see `_part`.
        plan: of the kernel.
    """
    *entries, mask = columns
    mask = mask[:_THREAD_WORDS]
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


def _put_factor(
    columns: list[list[jax.Array]], memory: tl.Memory, token_row: jax.Array, part: jax.Array, plan: _Plan
) -> tl.Memory:
    """Put what a token's kept entries are to be scaled by behind them in shared memory; 0 where they stay as they are.

    See `rescale_to_norm`. The norm of what is kept is taken from there, which is less than all. Arguments as `_append`.
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


def _norm(words: list[jax.Array], plan: _Plan) -> jax.Array:
    """The L2 norm of the entries that a token's threads hold."""
    total = functools.reduce(jnp.add, (x * x for x in _floats(words, plan)))
    if plan.parts == 2:
        beside = tl.from_neighbour(lax.bitcast_convert_type(total, jnp.int32), interpret=plan.interpret)
        total += lax.bitcast_convert_type(beside, jnp.float32)
    return jnp.sqrt(total)


def _store_values(ref: tl.Ref, memory: tl.Memory, row: jax.Array, plan: _Plan) -> None:
    """Move a block of values from shared memory to its place."""
    for place, is_piece in _pieces(plan):
        token, chunk = place % _BLOCK, jnp.where(is_piece, place // _BLOCK, 0)
        start = tl.shared_offset(memory, token * np.int32(4 * plan.row_words), interpret=plan.interpret)
        first = start + chunk * np.int32(2 * plan.chunk)
        places = range(0, 2 * plan.chunk, 4)
        words = tl.stack([_fuse(plan, _pair, [], memory, start, first, place=place) for place in places])
        _store_piece(ref, words, row, place, is_piece, plan)


def _pair(
    _: Any, memory: tl.Memory, token_row: jax.Array, chunk_start: jax.Array, *, place: int, plan: _Plan
) -> jax.Array:
    """Two slots of a chunk, `place` bytes from its start in the memory, scaled by the factor in their token's row."""
    load = functools.partial(tl.shared_load, memory, clear=False, interpret=plan.interpret)
    word = load(chunk_start, constant=place)
    if plan.rescale:
        factor = lax.bitcast_convert_type(load(token_row, constant=2 * plan.kept), jnp.float32)
        word = _scale(word, factor, plan)
    return word


def _scale(word: jax.Array, factor: jax.Array, plan: _Plan) -> jax.Array:
    limit = float(jnp.finfo(plan.dtype).max)
    [scaled] = _words([jnp.clip(x * factor, -limit, limit) for x in _floats([word], plan)], plan)
    return jnp.where(factor > 0, scaled, word)


def _pieces(plan: _Plan) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The chunks of a block of values, one per thread at a time: place, and whether there is one."""
    pieces = _BLOCK * plan.kept // plan.chunk
    for start in range(0, pieces, plan.threads):
        place = start + _lane(plan)
        yield place, place < pieces


def _store_piece(
    ref: tl.Ref, words: jax.Array, row: jax.Array, place: jax.Array, is_piece: jax.Array, plan: _Plan
) -> None:
    """Store a chunk of slots, as words [threads, chunk / 2], at its place within the block of values."""
    halves = jnp.stack(tl.as_dtype_pairs(words, jnp.int16), axis=-1).reshape(-1, plan.chunk)
    slot = jnp.arange(plan.chunk, dtype=jnp.int32)[None, :]
    where = (row * plan.kept + place * plan.chunk)[:, None] + slot
    tl.store(ref.at[where], halves, mask=jnp.broadcast_to(is_piece[:, None], where.shape))
