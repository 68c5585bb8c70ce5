"""From dense keys and values to rows of codes in one pass, written into the cache in place.

A program takes 16 tokens of one head as one tile, of which Triton deals each thread the entries that a product of
matrices does: two tokens, and of each the channels that stand in its words. Levels, scales and words are those of
`codecs` and `layout`, run on the tile.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mustafar_jax import layout
from mustafar_jax.codecs import ScaledCodec
from mustafar_jax.layout import TILE, WORD
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.prune_pack.program import of_head
from mustafar_jax.pruning import largest, magnitude_bits
from mustafar_jax.rotation import SIGNS, block_size
from mustafar_jax.rows import RowFormat, Rows


class Code(NamedTuple):
    """Dense keys or values, and where their codes go.

    Attributes:
        source: [B, S, K, H], or [B, K, S, H] as `code_pack` is told.
        target: the rows of codes that are overwritten.
        kept: entries that a row with a bitmap keeps, its largest magnitudes; at most its slots.
        mean: where keys are centred, what is taken off them first; its `offset` is the position of the target's row 0.
        weight: float32 [B, K, H], by which entries of rows with a bitmap are weighed when they are ranked, and errors
            when they are coded.
        turn: code vectors as `rotation.turn` gives them; for rows without a bitmap.
    """

    source: jax.Array
    target: Rows
    kept: int
    mean: Mean | None = None
    weight: jax.Array | None = None
    turn: bool = False


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for: a `Code` without its arrays.

    Attributes:
        format, rows: of the target.
        kept, turn: see `Code`.
        centred: whether there is a mean.
        weighed: whether there is a weight.
    """

    format: RowFormat
    rows: int
    kept: int
    turn: bool
    centred: bool
    weighed: bool

    @classmethod
    def of(cls, code: Code) -> "_Plan":
        """The plan of one source and target."""
        target, centred, weighed = code.target, code.mean is not None, code.weight is not None
        return cls(target.format, target.padded_length, code.kept, code.turn, centred, weighed)

    @property
    def codec(self) -> ScaledCodec:
        """Of the rows."""
        assert isinstance(self.format.codec, ScaledCodec)
        return self.format.codec

    @property
    def tokens(self) -> int:
        """Of a program: what registers hold without spilling, more of which masks and weights take."""
        return TILE if self.format.slots is None else TILE // 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """A tile as it is loaded: pieces of a row's channels, tokens, channels of a piece."""
        return self.format.head_dim // TILE, self.tokens, TILE

    @property
    def channel(self) -> jax.Array:
        """Int32 [pieces, 1, 16]: the channels of such a tile."""
        pieces = lax.broadcasted_iota(jnp.int32, (self.shape[0], 1, TILE), 0)
        return pieces * TILE + lax.broadcasted_iota(jnp.int32, (self.shape[0], 1, TILE), 2)


def code_pack(
    codes: Sequence[Code],
    first: jax.Array,
    start: jax.Array,
    held: jax.Array,
    *,
    rows: int,
    head_axis: int,
    interpret: bool = False,
) -> list[Rows]:
    """Code consecutive rows of each sequence, pruned first where the target has a bitmap, and write them into rows.

    Source rows first .. first + rows - 1 become target rows start .. start + rows - 1.

    Args:
        codes: keys, values or both; all of one shape and dtype of source.
        first: int32 [B].
        start: int32 [B], multiples of 32; a sequence whose start is at the target's end or beyond is left as it is.
        held: int32 [B], multiples of 32: of the rows, those from here on are overwritten with empty ones where there is
            a bitmap, and left as they are where there is none.
        rows: a multiple of 32.
        head_axis: the axis of the sources' heads: 2 in [B, S, K, H], 1 in [B, K, S, H].
        interpret: run as plain JAX, anywhere.

    Returns:
        The targets with the rows in them: the same buffers, where they are donated.

    Raises:
        NotImplementedError: see `language.check_supported`.
        ValueError: rows that are no multiple of 32, sources of several shapes or dtypes.
    """
    source, plans = codes[0].source, tuple(_Plan.of(code) for code in codes)
    tl.check_supported(dtype=source.dtype, head_dim=source.shape[3])
    if rows % WORD:
        raise ValueError(f"{rows=} must be a multiple of {WORD}")
    kinds = {f"{code.source.dtype}{list(code.source.shape)}" for code in codes}
    if len(kinds) > 1:
        raise ValueError(f"sources are {' and '.join(sorted(kinds))}; wanted one shape and dtype")
    of_sequence = pl.BlockSpec((None, 1), lambda head, tile, sequence, side: (sequence, 0))
    operands = [(x.astype(jnp.int32)[:, None], of_sequence) for x in (first, start, held)]
    targets: list[tuple[jax.Array, pl.BlockSpec]] = []
    for code in codes:
        operands += [of_head(code.source, head_axis), *_mean_operands(code)]
        operands += [] if code.weight is None else [of_head(code.weight)]
        targets += [of_head(x.reshape(*code.target.leading, -1)) for x in _arrays(code.target).values()]
    outs = tl.pallas_call(
        functools.partial(_kernel, plans=plans),
        name="code_pack",
        num_warps=1,
        interpret=interpret,
        grid=(source.shape[head_axis], rows // _step(plans), source.shape[0], len(codes)),
        in_specs=[spec for _, spec in operands + targets],
        out_specs=[spec for _, spec in targets],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array, _ in targets],
        input_output_aliases={len(operands) + i: i for i in range(len(targets))},
    )(*(array for array, _ in operands + targets))
    written = iter(outs)
    return [
        dataclasses.replace(
            code.target,
            **{name: next(written).reshape(array.shape) for name, array in _arrays(code.target).items()},
        )
        for code in codes
    ]


def _arrays(rows: Rows) -> dict[str, Any]:
    """The arrays that rows are written to, in the order of a kernel's operands."""
    arrays = {name: getattr(rows, name) for name in ("bitmap", "payload", "scale")}
    return {name: array for name, array in arrays.items() if array is not None}


def _step(plans: Sequence[_Plan]) -> int:
    """Tokens from one program to the next; those of a plan that takes more at once pass over what they have."""
    return min(plan.tokens for plan in plans)


def _mean_operands(code: Code) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """What is read of a mean: keys [H], and cos and sin of turns, to the target's groups and from there to each token.

    R_{s + j} m = R_j R_s m. Float32 [groups, 2, H / 2] and [2, 32, H / 2]: constants, the same for every layer
    of a model, whose compiler keeps one.
    """
    if code.mean is None:
        return []
    mean, groups = code.mean, np.arange(code.target.padded_length // WORD)
    to_group = mean.angles(np.repeat(groups[:, None] * WORD, mean.inv_freq.size, axis=1))
    to_token = mean.places(np.arange(WORD)).astype(np.float32) * mean.inv_freq
    tables = (
        jnp.asarray(np.stack([np.cos(to_group), np.sin(to_group)], axis=1)),
        jnp.asarray([np.cos(to_token), np.sin(to_token)]),
    )
    return [of_head(mean.key), *((x, pl.BlockSpec(x.shape, lambda *_, zeros=(0,) * x.ndim: zeros)) for x in tables)]


def _kernel(
    first_ref: tl.Ref,  # [1]
    start_ref: tl.Ref,  # [1]
    held_ref: tl.Ref,  # [1]
    *refs: tl.Ref,
    plans: tuple[_Plan, ...],
) -> None:
    """A tile of one head's keys or values.

    The other refs, for each plan: source [S, H]; with a mean what `_mean_operands` says; with a weight that, [H]. Then
    for all plans the targets' arrays, which alias the outputs; then the outputs: with a bitmap that, [S * H / 32];
    payload [words], scales [S].
    """
    offset = pl.program_id(1) * _step(plans)
    first, row, held = first_ref[0] + offset, start_ref[0] + offset, held_ref[0]
    counts = [2 if plan.format.slots is None else 3 for plan in plans]
    inputs, outputs = iter(refs), iter(refs[len(refs) - sum(counts) :])
    for side, (plan, count) in enumerate(zip(plans, counts, strict=True)):
        source_ref = next(inputs)
        mean_refs = tuple(next(inputs) for _ in range(3 if plan.centred else 0))
        weight_ref = next(inputs) if plan.weighed else None
        targets = tuple(next(outputs) for _ in range(count))
        is_meant = (pl.program_id(3) == side) & (row < plan.rows) & (offset % plan.tokens == 0)
        code = functools.partial(_code_tile, source_ref, mean_refs, weight_ref, targets, first, row, plan)
        pl.when(is_meant & (offset < held))(code)
        if plan.format.slots is not None:
            pl.when(is_meant & (offset >= held))(functools.partial(_clear, targets, row, plan))


def _code_tile(
    source_ref: tl.Ref,
    mean_refs: tuple[tl.Ref, ...],
    weight_ref: tl.Ref | None,
    outputs: tuple[tl.Ref, ...],
    first: jax.Array,
    row: jax.Array,
    plan: _Plan,
) -> None:
    """Code one tile, and store it in rows from `row` on."""
    x = _load(source_ref, first, plan)
    if mean_refs:
        x = x.astype(jnp.float32) - _mean(mean_refs, row, plan)
    if plan.format.slots is None:
        _code_whole(x, outputs, row, plan)
    else:
        weight = None if weight_ref is None else tl.load(weight_ref.at[jnp.arange(plan.format.head_dim)])[None]
        _code_pruned(x, weight, outputs, row, plan)


def _load(ref: tl.Ref, first: jax.Array, plan: _Plan) -> jax.Array:
    """The tile from a row of the source on, of `plan.shape`."""
    token = first + lax.broadcasted_iota(jnp.int32, plan.shape, 1)
    return tl.load(ref.at[token, jnp.broadcast_to(plan.channel, plan.shape)])


def _mean(refs: tuple[tl.Ref, ...], row: jax.Array, plan: _Plan) -> jax.Array:
    """The mean key, rotated as each of a tile's tokens lacks it; of `plan.shape`.

    A channel and its partner are rotated alike, so no thread needs another's.
    """
    mean_ref, to_group_ref, to_token_ref = refs
    half, channel = plan.format.head_dim // 2, plan.channel
    is_second = channel >= half
    pair = jnp.where(is_second, channel - half, channel)
    own = tl.load(mean_ref.at[channel])
    other = tl.load(mean_ref.at[jnp.where(is_second, pair, pair + half)])
    cos, sin = (tl.load(to_group_ref.at[row // WORD, i, pair]) for i in range(2))
    sin = jnp.where(is_second, -sin, sin)
    own, other = own * cos - other * sin, other * cos + own * sin
    token = row % WORD + lax.broadcasted_iota(jnp.int32, plan.shape, 1)
    pair = jnp.broadcast_to(pair, plan.shape)
    cos, sin = (tl.load(to_token_ref.at[i, token, pair]) for i in range(2))
    return own * cos - jnp.where(is_second, -other, other) * sin


def _code_whole(x: jax.Array, outputs: tuple[tl.Ref, ...], row: jax.Array, plan: _Plan) -> None:
    """Code every entry of a tile and store it."""
    payload_ref, scale_ref = outputs
    bits, head_dim = plan.codec.bits, plan.format.head_dim
    codes, scale = _coded(_rows_of(_turn(x, plan) if plan.turn else x.astype(jnp.float32)), None, plan)
    _store_scale(scale_ref, scale, row)
    counts = layout.coded_words(head_dim, bits)
    vector, shift, before = math.gcd(4, *counts), 0, 0
    for width, count in zip(layout.planes(bits), counts, strict=True):
        words = layout.tile_words(codes >> shift & (1 << width) - 1, width, plan.format.pairs)
        group, half = row // WORD, row % WORD // TILE
        _store_words(payload_ref, words, group * sum(counts), before + half * (count // 2), vector)
        shift, before = shift + width, before + count


def _code_pruned(
    x: jax.Array, weight: jax.Array | None, outputs: tuple[tl.Ref, ...], row: jax.Array, plan: _Plan
) -> None:
    """Choose a tile's entries, code them, and store both."""
    bitmap_ref, payload_ref, scale_ref = outputs
    x = _rows_of(x)
    exact = x.astype(jnp.float32)
    ranked = exact if weight is None else exact * weight
    mask = largest(magnitude_bits(ranked.astype(plan.format.dtype)).astype(jnp.int32), plan.kept, highest=14)
    counts = jnp.where(mask, 1.0 if weight is None else weight**2, 0.0)
    codes, scale = _coded(jnp.where(mask, exact, 0.0), counts, plan)
    _store_scale(scale_ref, scale, row)
    _store_bitmap(bitmap_ref, jnp.where(mask, 1, 0), row, plan)
    per_word = WORD // plan.codec.bits
    slot = jnp.where(mask, jnp.cumsum(jnp.where(mask, 1, 0), axis=-1) - 1, -1)
    shifted = codes << slot % per_word * plan.codec.bits
    for word in range(plan.format.room // per_word):
        is_here = slot // per_word == word if word else (slot >= 0) & (slot < per_word)
        _store_word(payload_ref, jnp.sum(jnp.where(is_here, shifted, 0), axis=-1), word, row, plan)


def _clear(outputs: tuple[tl.Ref, ...], row: jax.Array, plan: _Plan) -> None:
    """Store empty rows."""
    bitmap_ref, payload_ref, scale_ref = outputs
    _store_scale(scale_ref, jnp.zeros(plan.tokens, jnp.float32), row)
    _store_bitmap(bitmap_ref, jnp.zeros((plan.tokens, plan.format.head_dim), jnp.int32), row, plan)
    for word in range(plan.format.room * plan.codec.bits // WORD):
        _store_word(payload_ref, jnp.zeros(plan.tokens, jnp.int32), word, row, plan)


def _store_bitmap(ref: tl.Ref, mask: jax.Array, row: jax.Array, plan: _Plan) -> None:
    """Store the bitmap words of a mask, int32 [n, H] of 1 and 0."""
    shape = plan.tokens, plan.format.head_dim // WORD
    bits = mask.reshape(*shape, WORD)
    words = jnp.sum(bits << lax.broadcasted_iota(jnp.int32, bits.shape, 2), axis=-1)
    token, word = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    tl.store(ref.at[(row + token) * shape[1] + word], words.astype(jnp.uint32))


def _store_word(ref: tl.Ref, words: jax.Array, word: int, row: jax.Array, plan: _Plan) -> None:
    """Store one word [n] of the slots of each token."""
    count = plan.format.room * plan.codec.bits // WORD
    vector = math.gcd(4, count)
    token = row % WORD + jnp.arange(words.size, dtype=jnp.int32)
    place = row // WORD * (WORD * count) + (word // vector * WORD + token) * vector + word % vector
    tl.store(ref.at[place], words.astype(jnp.uint32))


def _store_words(ref: tl.Ref, words: jax.Array, group: jax.Array, first: jax.Array, vector: int) -> None:
    """Store words [n, 32] of a group's lanes, `vector` of which stand together.

    Args:
        ref: the payload.
        words: of all lanes.
        group: words of one lane that stand before the group.
        first: the number of the first word within the group, a multiple of n.
        vector: of the payload.
    """
    count = words.shape[0]
    together = math.gcd(vector, count)
    shape = (count // together, WORD, together)
    pieces = words.reshape(count // together, together, WORD).transpose(0, 2, 1) if together > 1 else words[..., None]
    word = first + lax.broadcasted_iota(jnp.int32, shape, 0) * together + lax.broadcasted_iota(jnp.int32, shape, 2)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    place = group * WORD + word // vector * (WORD * vector) + lane * vector + word % vector
    tl.store(ref.at[place], pieces.astype(jnp.uint32))


def _store_scale(ref: tl.Ref, scale: jax.Array, row: jax.Array) -> None:
    """Store the scales [n] of a tile in the order of `layout.to_lanes`."""
    token = row % WORD + jnp.arange(scale.size, dtype=jnp.int32)
    tl.store(ref.at[row // WORD * WORD + token % 8 * 4 + token // 8], scale.astype(ref.dtype))


def _rows_of(tile: jax.Array) -> jax.Array:
    """[pieces, n, 16] -> [n, H]."""
    return tile.transpose(1, 0, 2).reshape(tile.shape[1], -1)


def _coded(x: jax.Array, counts: jax.Array | None, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """The int32 codes [n, H] and float32 scales [n] of rows; scales of rows that are not finite are NaN."""
    counts = jnp.float32(1) if counts is None else counts
    is_finite = jnp.abs(x) < jnp.inf
    odd = jnp.sum(jnp.where(is_finite, 0, 1), axis=-1)
    levels, scale = plan.codec.fit(jnp.where(is_finite, x, 0.0), counts)
    return plan.codec.code(levels), jnp.where(odd > 0, jnp.nan, scale)


def _turn(x: jax.Array, plan: _Plan) -> jax.Array:
    """A tile as `rotation.turn` gives it, but for rounding.

    A Hadamard matrix of H channels is one of 16 within each piece, a product on tensor cores, and one of the pieces,
    sums within threads. Entries of 1/16 keep what is not too large to turn from overflowing in between.
    """
    size = block_size(plan.format.head_dim)
    limit = float(np.finfo(np.float32).max) / size**0.5
    bits, x = int(jnp.finfo(x.dtype).nmant) + 1, x.astype(jnp.float32)
    x = jnp.where(jnp.abs(x) <= limit, x, jnp.nan)
    minus = lax.shift_right_logical(plan.channel * np.int32(np.uint32(SIGNS).astype(np.int32)), np.int32(31))
    x = jnp.where(minus == 1, -x, x).reshape(-1, TILE)
    row, column = (lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis) for axis in range(2))
    matrix = jnp.where(lax.population_count(row & column) & 1 == 1, -1 / TILE, 1 / TILE).astype(jnp.bfloat16)
    turned = sum((tl.dot(piece, matrix) for piece in _pieces(x, bits)), jnp.float32(0)).reshape(plan.shape)
    return _butterflies(turned.transpose(1, 2, 0)).transpose(2, 0, 1) * (TILE / size**0.5)


def _pieces(x: jax.Array, bits: int) -> Iterator[jax.Array]:
    """Bfloat16 numbers, which tensor cores multiply exactly, whose sum is x: float32 of so many significant bits."""
    for _ in range(math.ceil(bits / 8)):
        piece = x.astype(jnp.bfloat16)
        yield piece
        x = x - piece.astype(jnp.float32)


def _butterflies(x: jax.Array) -> jax.Array:
    """The Hadamard transform along the last axis, unscaled."""
    size, done = x.shape[-1], 1
    while done < size:
        first, second = tl.split(x.reshape(*x.shape[:-1], size // 2, 2))
        sums = jnp.stack([first + second, first - second], axis=-1)  # [..., size / 2, 2]
        x = sums.swapaxes(-2, -1).reshape(x.shape)
        done *= 2
    return x
