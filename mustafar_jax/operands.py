"""What attention, packing and products are given, whoever computes them: XLA, cuDNN or the kernels.

Letters: B sequences, S tokens, N query heads, K KV heads, G = N // K, H head_dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.layout import WORD, Dealt
from mustafar_jax.pruning import Context, Method
from mustafar_jax.rope import rotate_by
from mustafar_jax.rotation import turn_back
from mustafar_jax.rows import RowFormat, Rows

_SLOW = 0.65
"""Radians that a slow pair of channels turns in half a group of tokens, at most."""


class Mean(NamedTuple):
    """A mean key: rows hold the distance of each key from it, rotated to where the key stands.

    A pair of channels that turns slowly is rotated to the middle of the row's group of 32 instead. Little of a key's
    distance is added by that (half a percent of its energy, where keys have a large mean), and its part of a score is
    the same for the whole group.

    Attributes:
        key: float32 [B, K, H], before rotation.
        inv_freq: float32 [H / 2], RoPE's frequencies; channel i pairs with i + H / 2.
        offset: the position of row 0.
        dealt: where rows are dealt round to devices, to which this one has; rows are counted as they stand there.
    """

    key: jax.Array
    inv_freq: np.ndarray
    offset: int
    dealt: Dealt = Dealt(WORD)

    @property
    def fast_pairs(self) -> int:
        """How many pairs, the first ones, are rotated to each row: 16, 32, ..., as kernels take them, or all."""
        fast = np.flatnonzero(np.abs(self.inv_freq) * (WORD / 2) > _SLOW)
        count = max(16, 1 << int(fast[-1] if fast.size else 0).bit_length())
        return min(count, self.inv_freq.size)

    def places(self, rows: Any) -> Any:
        """What each pair of channels is rotated to for rows [...]: the row, or its group's middle; [..., H / 2].

        A numpy array for one, a jax array for one, or where rows are dealt.
        """
        rows = self.dealt.row(rows)
        return self._by_speed(rows, rows // WORD * WORD + WORD // 2)

    def bases(self, rows: Any) -> Any:
        """What `places(rows + t)` is more than `places(t)`, for t that carry nothing into their group's number."""
        return self._by_speed(rows, rows // WORD * WORD)

    def _by_speed(self, fast: Any, slow: Any) -> Any:
        numbers = np if isinstance(fast, np.ndarray) else jnp
        is_fast = _beneath(np.arange(self.inv_freq.size) < self.fast_pairs, fast.ndim)
        return numbers.where(is_fast, fast[..., None], slow[..., None])

    def table(self, make: Callable[["Mean"], np.ndarray]) -> np.ndarray | jax.Array:
        """What a function makes of the rows' places; of dealt rows, this device's of what it makes for each."""
        if self.dealt.count == 1:
            return make(self)
        devices = (dataclasses.replace(self.dealt, index=index) for index in range(self.dealt.count))
        return jnp.asarray(np.stack([make(self._replace(dealt=dealt)) for dealt in devices]))[self.dealt.index]

    def at(self, positions: jax.Array) -> jax.Array:
        """The mean as rows at positions [B or 1, n] lack it; float32 [B, K, n, H]."""
        return rotate_by(self.key[:, :, None], self.angles(self.places(positions - self.offset))[:, None])

    def angles(self, places: Any) -> Any:
        """Float32 [..., H / 2], radians: of positions `offset` + places [..., H / 2].

        A numpy array for one, a jax array for one.
        """
        positions = (self.offset + places).astype(np.float32)
        return positions * _beneath(self.inv_freq.astype(np.float32), positions.ndim - 1)


def _beneath(x: np.ndarray, axes: int) -> np.ndarray:
    """With so many axes before the last one: jax may be told to promote no ranks."""
    return x.reshape((1,) * axes + x.shape)


def restored(rows: Rows, *, turned: bool, mean: Mean | None = None, start: jax.Array | int = 0) -> jax.Array:
    """Stored keys or values [B, K, n, H] as attention sees them.

    Args:
        rows: [B, K, n, H].
        turned: whether they are held as `rotation.turn` gives them; float32 then.
        mean: of centred keys, to be added; float32 then.
        start: the row of its cache that the first one is.
    """
    array = turn_back(rows.to_array()) if turned else rows.to_array()
    if mean is None:
        return array
    positions = mean.offset + start + jnp.arange(rows.length)
    return array.astype(jnp.float32) + mean.at(positions[None])


class Tail(NamedTuple):
    """The tokens that are not packed: the first ones of each sequence, then a ring of the most recent ones.

    Attributes:
        key, value: [B, K, slots, H]; the token at position p stands in slot p where p < sinks, else in slot sinks +
            (p - sinks) % (slots - sinks).
        sinks: how many first tokens stay; static.
    """

    key: jax.Array
    value: jax.Array
    sinks: int

    def first_row(self, lengths: jax.Array, window: int | None) -> jax.Array:
        """The first packed row that a window of so many tokens shows, int32 [B]; row r is position sinks + r."""
        return jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window - self.sinks, 0)


@dataclasses.dataclass(frozen=True)
class PromptAttention:
    """Causal attention over prompts that are padded on the right. No valid query sees padding, so it needs no mask.

    Attributes:
        query: [B, S, N, H].
        key, value: [B, S, K, H].
        scale: factor on the scores.
        window: the query at position p sees positions s with p - s < window; all if None.
        soft_cap: a score x counts as soft_cap * tanh(x / soft_cap); as it is if None.
        return_lse: whether the log-sum-exp of the scores is wanted, too.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    scale: float
    window: int | None
    soft_cap: float | None = None
    return_lse: bool = False


@dataclasses.dataclass(frozen=True)
class DenseAttention:
    """Attention of the last token of each sequence, or of several that follow it, to a dense cache.

    Attributes:
        query: [B, K, G, H]; of `new` tokens [B, K, new * G, H], token after token.
        key, value: [B, capacity, K, H].
        lengths: int32 [B]; what stands from there on may be anything.
        scale, window, soft_cap, return_lse: as in `PromptAttention`.
        new: 0 where queries are those of the last tokens, at positions lengths - 1. Else of how many tokens at the
            positions from `lengths` on they are; these are not in the cache.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    scale: float
    window: int | None
    soft_cap: float | None = None
    return_lse: bool = False
    new: int = 0


@dataclasses.dataclass(frozen=True)
class PackedAttention:
    """Attention of the last token of each sequence, or of several that follow it, to a packed cache.

    Attributes:
        query: [B, K, G, H]; of `new` tokens [B, K, new * G, H], token after token.
        key, value: rows [B, K, S, H]; row r holds position tail.sinks + r. What is not visible may be anything.
        tail: the tokens before and behind them.
        lengths: int32 [B], tokens of each sequence.
        packed_lengths: int32 [B], how many of them are rows of `key` and `value`.
        mean: where keys are centred, what they are distances from.
        scale, window: as in `PromptAttention`.
        turned_keys, turned_values: whether rows are held as `rotation.turn` gives them; the mean and the tail are not.
        soft_cap, return_lse: as in `PromptAttention`.
        new: as in `DenseAttention`.
    """

    query: jax.Array
    key: Rows
    value: Rows
    tail: Tail
    lengths: jax.Array
    packed_lengths: jax.Array
    mean: Mean | None
    scale: float
    window: int | None
    turned_keys: bool = False
    turned_values: bool = False
    soft_cap: float | None = None
    return_lse: bool = False
    new: int = 0


@dataclasses.dataclass(frozen=True)
class Side:
    """Keys or values that leave the dense part of a cache: where they are, where they go, and what becomes of them.

    Attributes:
        source: [B, S, K, H] or [B, K, S, H]; `Packing.head_axis` says which.
        target: the rows that are overwritten.
        format: of the target.
        rule: the name of the rule that chooses entries; without effect where the format holds all.
        method: the rule.
        sparsity: the fraction that it removes.
        mean: where keys are centred, what is taken off them first.
        weight: float32 [B, K, H], by which entries are weighed when they are ranked, and errors when what is kept is
            coded; None weighs all alike.
        rescale: scale what is kept of a vector to the whole vector's L2 norm.
        turn: hold vectors as `rotation.turn` gives them.
    """

    source: jax.Array
    target: Rows
    format: RowFormat
    rule: str
    method: Method
    sparsity: float
    mean: Mean | None = None
    weight: jax.Array | None = None
    rescale: bool = False
    turn: bool = False


@dataclasses.dataclass(frozen=True)
class Packing:
    """Consecutive tokens of each sequence that are pruned, packed and written into rows.

    Source rows first .. first + rows - 1 become target rows start .. start + rows - 1.

    Attributes:
        key, value: the two sides.
        first: int32 [B], the first token's row in the sources.
        start: int32 [B], the target row that it gets; at the end or beyond, the sequence is left alone.
        held: int32 [B], how many tokens there are; of rows with a bitmap, what follows them is made empty, as far as
            the target goes.
        bounded: whether all `rows` have a place in the target, wherever they start; static.
        rows: how many rows are written; a multiple of 32, as `start` and `held` are.
        head_axis: the axis of the sources' heads, 1 or 2.
        offset: the position of target row 0.
        context: positions [B, rows], valid [B, rows] -> what rules see besides the entries. To be called where
            something is packed alone, for it may cost much.
    """

    key: Side
    value: Side
    first: jax.Array
    start: jax.Array
    held: jax.Array
    rows: int
    head_axis: int
    offset: int
    context: Callable[[jax.Array, jax.Array], Context]
    bounded: bool = True

    @property
    def count(self) -> jax.Array | None:
        """int32 [B], the rows to write where there may be no place for all; else None."""
        return None if self.bounded else self.held

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys, then values."""
        return self.key, self.value

    def taken(self, source: jax.Array) -> jax.Array:
        """The tokens [B, K, rows, H] of a source that leave."""
        row = (self.first[:, None] + jnp.arange(self.rows)[None])[:, :, None, None]
        if self.head_axis == 1:
            return jnp.take_along_axis(source, row.swapaxes(1, 2), axis=2)
        return jnp.take_along_axis(source, row, axis=1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with stored rows, float32.

    Attributes:
        what: "scores" of keys, query . key; or "sums" of values, weighted.
        x: queries [..., G, H], or weights [..., G, S].
        rows: [..., S, H].
    """

    what: Literal["scores", "sums"]
    x: jax.Array
    rows: Rows
