"""The KV cache of one attention layer: a packed part, and a dense part of sink tokens and the most recent ones."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from mustafar_jax import bitmap
from mustafar_jax.bitmap import BitmapArray
from mustafar_jax.config import CompressionConfig
from mustafar_jax.implementations import (
    Implementation,
    Names,
    check_implementation,
    first_that_runs,
    kernels,
    kernels_or_xla,
)
from mustafar_jax.pruning import RECENT, WEIGHING, Context, Method, query_weight, rescale_to_norm
from mustafar_jax.rope import rotate
from mustafar_jax.writes import write_rows

T = TypeVar("T")


def _register(*, data_fields: list[str], meta_fields: list[str]) -> Callable[[type[T]], type[T]]:
    """Make a dataclass a pytree of its data fields; the others are static."""
    return functools.partial(jax.tree_util.register_dataclass, data_fields=data_fields, meta_fields=meta_fields)


_COUNTS = ["lengths", "overflow"]
_STATIC = ["config", "capacity", "num_kv_heads", "head_dim", "dtype"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values of one attention layer for a batch of sequences, each of its own length. A pytree.

    `LayerCache.init` makes a `PackedCache`, or a `DenseCache` where the config prunes nothing. Everything has a static
    shape, so one compiled step serves a whole generation; donate the cache to that step and it is updated in place.

    Attributes:
        lengths: int32 [B], tokens held per sequence.
        overflow: bool [B], set where a token came for which there was no room; it was not written. Also where a value
            needed more than `config.v_slots`; what did not fit of it is missing.
        config: how the cache is compressed.
        capacity: tokens that fit per sequence: sinks, packed and recent ones together.
        num_kv_heads, head_dim, dtype: of the keys and values.
    """

    lengths: jax.Array
    overflow: jax.Array
    config: CompressionConfig
    capacity: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]

    @staticmethod
    def init(
        config: CompressionConfig,
        *,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        inv_freq: ArrayLike | None = None,
        num_heads: int | None = None,
    ) -> "LayerCache":
        """An empty cache.

        Args:
            config: how it is compressed.
            batch: sequences.
            capacity: tokens per sequence, all of them counted.
            num_kv_heads: KV heads.
            head_dim: entries of a key or value vector; a multiple of 32 unless the config prunes nothing.
            dtype: bfloat16, float16 or float32.
            inv_freq: the model's RoPE frequencies, concrete float32 [head_dim / 2]; needed for `center_keys`.
            num_heads: query heads, a multiple of the KV heads; needed for methods that score with queries.

        Raises:
            ValueError: an argument out of its range.
            TypeError: an argument of another type, an unsupported dtype.
        """
        if not isinstance(config, CompressionConfig):
            raise TypeError(f"{config=} must be a CompressionConfig")
        sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if not isinstance(size, int | np.integer):
                raise TypeError(f"{name}={size!r} must be an integer")
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        dtype = check_dtype(dtype)
        if head_dim % bitmap.WORD and not config.is_dense:
            raise ValueError(f"{head_dim=} must be a multiple of {bitmap.WORD} where keys or values are pruned")
        frequencies = None if config.is_dense else _frequencies(config, inv_freq, head_dim)
        return _empty_cache(config, **sizes, dtype=dtype, inv_freq=frequencies, num_heads=num_heads)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, all of them: packed and dense parts, bitmaps, means, weights, lengths, flags."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the keys and values of a dense cache of this capacity take."""
        return 2 * self.batch * self.capacity * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The keys and values that attention sees, [B, capacity, K, H], zero from each length on; and the lengths.

        Pruned entries are zero, a key mean is added back (keys are then float32), rescaled values are as stored.
        """
        raise NotImplementedError

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, names: Names
    ) -> Self:
        raise NotImplementedError

    def _append(self, key: jax.Array, value: jax.Array, query: jax.Array | None, names: Names) -> "LayerCache":
        raise NotImplementedError


def prefill(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | Sequence[int] | None = None,
    *,
    query: jax.Array | None = None,
    rows: ArrayLike | Sequence[int] | None = None,
    implementation: Implementation = None,
) -> LayerCache:
    """Fill a cache with a prompt's keys and values, pruning and packing what leaves the dense window.

    Args:
        cache: the cache; what its sequences (those in `rows`) held is replaced.
        key, value: [B, S, K, H] in the cache's dtype, keys after RoPE at positions 0 .. S - 1; padded on the right.
        lengths: int [B], valid tokens of each sequence, 0 .. S; all S if None. Under jit, one outside of that counts as
            the nearest, and sets the sequence's `overflow`.
        query: [B, S, N, H] after RoPE, needed (and read) where keys are weighed, or a method scores with the most
            recent queries. Where it scores with their attention, that is over all earlier tokens, whatever sliding
            window the model has.
        rows: int [B], the cache's sequences to fill, each at most once; all of them, in order, if None. The named
            sequences' part of the cache is copied once.
        implementation: who prunes and packs: "triton" (NVIDIA GPUs, bfloat16 and float16, by magnitude), "xla", a
            sequence of names tried in order, or None for the best that works here. What is packed is the same.
            `packers` says which of these go with a name for attention.

    Raises:
        ValueError: shapes, lengths or rows that do not fit the cache or each other, S above the capacity, an unknown
            implementation.
        TypeError: another dtype than the cache's; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    names = check_implementation(implementation) or kernels_or_xla()
    batch = cache.batch if rows is None else _check_rows(rows, cache.batch)
    check_kv(cache, key, value, (batch, None, cache.num_kv_heads, cache.head_dim), "[B, S, K, H]")
    check_query(cache, query, key.shape[:2], "[B, S, N, H]")
    _check_weighing_query(cache, query, key.shape[:2])
    if key.shape[1] > cache.capacity:
        raise ValueError(f"key has {key.shape[1]} tokens; the cache's capacity is {cache.capacity}")
    given = check_lengths(lengths, batch, key.shape[1])
    lengths = jnp.clip(given, 0, key.shape[1])  # under jit they are not known to lie there
    part = cache if rows is None else jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], cache)
    part = part._prefill(key, value, lengths, query, names)
    part = dataclasses.replace(part, overflow=part.overflow | (given != lengths))
    if rows is None:
        return part
    return jax.tree.map(lambda whole, new: whole.at[jnp.asarray(rows)].set(new), cache, part)


def append(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    *,
    query: jax.Array | None = None,
    implementation: Implementation = None,
) -> LayerCache:
    """Add one token to every sequence; where that fills a group of recent tokens, prune and pack the oldest one.

    Args:
        cache: the cache; a sequence that is at its capacity keeps its tokens and gets `overflow` set.
        key, value: [B, K, H] in the cache's dtype, the key after RoPE at position `cache.lengths`.
        query: [B, N, H], the token's own after RoPE, needed (and read) where a method scores with recent queries.
        implementation: as in `prefill`.

    Raises:
        ValueError: shapes that do not fit the cache, an unknown implementation.
        TypeError: another dtype than the cache's; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    check_kv(cache, key, value, (cache.batch, cache.num_kv_heads, cache.head_dim), "[B, K, H]")
    check_query(cache, query, key.shape[:1], "[B, N, H]")
    names = check_implementation(implementation) or kernels_or_xla()
    with jax.named_scope("append"):  # a profile shows it by this name
        return cache._append(key, value, query, names)


def packers(implementation: Implementation) -> Names | None:
    """The implementation of `prefill` and `append` that goes with one named for attention.

    The names among them that prune and pack, in their order; None, the best that works here, where none does. So "xla"
    is XLA for both, "triton" Triton for both (or NotImplementedError, as everywhere for a name alone), and "cudnn" and
    "mosaic_gpu", which attend alone, leave packing to what is best.

    Raises:
        ValueError: an unknown implementation.
    """
    names = check_implementation(implementation)
    if names is None or isinstance(names, str):
        return names if names in _PACK else None
    return tuple(name for name in names if name in _PACK) or None


@_register(data_fields=["key", "value", *_COUNTS], meta_fields=_STATIC)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCache(LayerCache):
    """A cache that prunes nothing: key and value [B, capacity, K, H], the baseline of every comparison."""

    key: jax.Array
    value: jax.Array

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        held = (jnp.arange(self.capacity) < self.lengths[:, None])[..., None, None]
        return jnp.where(held, self.key, 0), jnp.where(held, self.value, 0), self.lengths

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, names: Names
    ) -> Self:
        held = (jnp.arange(key.shape[1]) < lengths[:, None])[..., None, None]
        return dataclasses.replace(
            self,
            key=self.key.at[:, : key.shape[1]].set(jnp.where(held, key, 0)),
            value=self.value.at[:, : key.shape[1]].set(jnp.where(held, value, 0)),
            lengths=lengths,
            overflow=jnp.zeros_like(self.overflow),
        )

    def _append(self, key: jax.Array, value: jax.Array, query: jax.Array | None, names: Names) -> Self:
        return dataclasses.replace(  # a sequence at its capacity has no row to write
            self,
            key=write_rows(self.key, key[:, None], self.lengths, axis=1),
            value=write_rows(self.value, value[:, None], self.lengths, axis=1),
            lengths=jnp.minimum(self.lengths + 1, self.capacity),
            overflow=self.overflow | (self.lengths >= self.capacity),
        )


Rows = BitmapArray | jax.Array
"""Rows of tokens [B, K, S, H]: packed, or an ordinary array where the config leaves this cache's sparsity at 0."""


@_register(data_fields=["dense", "packed"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Store:
    """The keys or the values of a `PackedCache`.

    Attributes:
        dense: [B, K, sinks + tail, H]; the first tokens of a sequence, then a ring of the most recent ones.
        packed: [B, K, C, H], the tokens between them.
    """

    dense: jax.Array
    packed: Rows


@_register(data_fields=["key", "value", "first", "start", "held"], meta_fields=["rows", "head_axis"])
@dataclasses.dataclass(frozen=True)
class _Leaving:
    """Tokens that leave the dense part: consecutive rows of each sequence, and where they go.

    Attributes:
        key, value: what they are taken from, [B, S, K, H] or [B, K, S, H].
        first: int32 [B], the first one's row.
        start: int32 [B], the packed row that it gets; at the end or beyond, the sequence is left alone.
        held: int32 [B], how many there are; what follows them is made empty.
        rows: how many are written; a multiple of 32, as `start` and `held` are.
        head_axis: the axis of the heads, 1 or 2.
    """

    key: jax.Array
    value: jax.Array
    first: jax.Array
    start: jax.Array
    held: jax.Array
    rows: int
    head_axis: int

    def taken(self, x: jax.Array) -> jax.Array:
        """The rows [B, K, rows, H] of `key` or `value`."""
        row = (self.first[:, None] + jnp.arange(self.rows))[:, :, None, None]
        if self.head_axis == 1:
            return jnp.take_along_axis(x, row.swapaxes(1, 2), axis=2)
        return jnp.take_along_axis(x, row, axis=1).swapaxes(1, 2)


@_register(
    data_fields=["keys", "values", "key_mean", "key_weight", "queries", *_COUNTS], meta_fields=["inv_freq", *_STATIC]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedCache(LayerCache):
    """A cache whose older tokens are pruned and packed. Head-major, so that no step transposes it.

    A token's place follows from its position and its sequence's length alone. Of the first `length` tokens:

        positions [0, sinks)                  dense slots [0, sinks)
        positions [sinks, sinks + P)          packed rows [0, P), P = config.packed_tokens(length)
        positions [sinks + P, length)         dense slots sinks + (position - sinks) % tail

    The tail is a ring of whole groups, so a group that leaves it is contiguous.

    Attributes:
        keys, values: what is held of each.
        key_mean: float32 [B, K, H], the mean key of the prompt before RoPE, fixed by `prefill`; None unless keys are
            centred. Packed keys are then distances from it: a key is what is held plus the mean, rotated to its
            position.
        key_weight: float32 [B, K, H], by which entries of keys are weighed when they are ranked, fixed by `prefill`;
            None unless keys are weighed.
        queries: [B, N, 32, H], the most recent queries, each in slot position % 32; None unless a method scores with
            them.
        inv_freq: the RoPE frequencies that rotate `key_mean`; static.
    """

    keys: Store
    values: Store
    key_mean: jax.Array | None
    key_weight: jax.Array | None
    queries: jax.Array | None
    inv_freq: tuple[float, ...] | None

    @property
    def packed_lengths(self) -> jax.Array:
        """int32 [B], packed tokens per sequence."""
        return self.config.packed_tokens(self.lengths)

    def dense_positions(self) -> jax.Array:
        """int32 [B, sinks + tail]: the position of the token in each dense slot, `lengths` or more where none is."""
        sinks, tail = _dense_slots(self.config, self.capacity)
        packed = self.packed_lengths[:, None]
        # The ring's oldest token has position sinks + packed, and stands in slot packed % tail.
        recent = sinks + packed + (jnp.arange(tail) - packed) % tail
        first = jnp.broadcast_to(jnp.arange(sinks), (self.batch, sinks))
        return jnp.concatenate([first, recent], axis=1)

    def mean_key(self, positions: jax.Array) -> jax.Array:
        """The mean key rotated to positions [B or 1, n]; float32 [B, K, n, H]."""
        assert self.key_mean is not None
        return rotate(self.key_mean[:, :, None], positions[:, None], jnp.asarray(self.inv_freq))

    def kernels_mean(self) -> Any:
        """The mean key as the kernels take it, a `rows.Mean`; None where there is none."""
        if self.key_mean is None:
            return None
        inv_freq = np.asarray(self.inv_freq, np.float32)
        return kernels("rows").Mean(self.key_mean, inv_freq, self.config.sink_tokens)

    def unpack_keys(self, packed: Rows, positions: jax.Array) -> jax.Array:
        """Packed keys [B, K, n, H] at positions [B or 1, n] as attention sees them; float32 where they are centred."""
        if self.key_mean is None or not isinstance(packed, BitmapArray):
            return to_array(packed)
        return bitmap.unpack(packed).astype(jnp.float32) + self.mean_key(positions)

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        return *self._to_dense(self.packed_lengths), self.lengths

    def _to_dense(self, packed_lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values where this many tokens [B] are packed."""
        sinks, slots = self.config.sink_tokens, self.keys.dense.shape[2]
        position = jnp.arange(self.capacity)[None]
        is_packed = (position >= sinks) & (position < sinks + packed_lengths[:, None])
        place = jnp.where(is_packed, slots + position - sinks, self._slot(position))
        held = (position < self.lengths[:, None])[..., None, None]

        def gather(dense: jax.Array, packed: jax.Array) -> jax.Array:
            both = jnp.concatenate([dense, packed], axis=2).swapaxes(1, 2)
            tokens = jnp.take_along_axis(both, place[..., None, None], axis=1, mode="clip")
            return jnp.where(held, tokens, 0)

        positions = sinks + jnp.arange(self.keys.packed.shape[2])[None]
        packed_keys = self.unpack_keys(self.keys.packed, positions)
        keys = gather(self.keys.dense.astype(packed_keys.dtype), packed_keys)
        return keys, gather(self.values.dense, to_array(self.values.packed))

    def _slot(self, position: jax.Array) -> jax.Array:
        """The dense slot that a token at this position has, or had."""
        sinks, tail = _dense_slots(self.config, self.capacity)
        return jnp.where(position < sinks, position, sinks + (position - sinks) % tail)

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, names: Names
    ) -> Self:
        cache = dataclasses.replace(self, lengths=lengths, overflow=jnp.zeros_like(self.overflow))
        if cache.key_mean is not None:
            cache = dataclasses.replace(cache, key_mean=_mean_key(cache, key))
        if cache.queries is not None:
            assert query is not None
            cache = dataclasses.replace(cache, queries=_recent_queries(cache, query))
        if cache.key_weight is not None:
            assert query is not None
            cache = dataclasses.replace(cache, key_weight=_key_weight(cache, query))
        cache = dataclasses.replace(
            cache,
            keys=Store(cache._dense_part(key), _without_overflow(self.keys.packed)),
            values=Store(cache._dense_part(value), _without_overflow(self.values.packed)),
        )
        first, start = jnp.full_like(lengths, self.config.sink_tokens), jnp.zeros_like(lengths)
        rows = self.config.packed_tokens(key.shape[1])
        return cache._pack(_Leaving(key, value, first, start, cache.packed_lengths, rows, head_axis=2), names)

    def _dense_part(self, x: jax.Array) -> jax.Array:
        """The sinks and recent tokens of a prompt [B, S, K, H], each in its slot; zero where a slot holds none."""
        positions = self.dense_positions()
        tokens = jnp.take_along_axis(x, positions[:, :, None, None], axis=1, mode="clip").swapaxes(1, 2)
        return jnp.where((positions < self.lengths[:, None])[:, None, :, None], tokens, 0)

    def _append(self, key: jax.Array, value: jax.Array, query: jax.Array | None, names: Names) -> "PackedCache":
        fits = self.lengths < self.capacity
        stores = (self.keys, key), (self.values, value)
        slot = jnp.where(fits, self._slot(self.lengths), self.keys.dense.shape[2])
        key, value = (write_rows(store.dense, token[:, :, None], slot, axis=2) for store, token in stores)
        written = dataclasses.replace(
            self,
            queries=self._with_query(query, fits),
            keys=Store(key, self.keys.packed),
            values=Store(value, self.values.packed),
            lengths=self.lengths + fits,
            overflow=self.overflow | ~fits,
        )
        return written.pack_oldest(self.packed_lengths, names)

    def pack_oldest(self, packed: jax.Array, names: Names | None = None) -> "PackedCache":
        """Prune and pack the oldest group of each sequence that has one to pack beside its `packed` [B] tokens."""
        start = jnp.where(self.packed_lengths > packed, packed, self.config.packed_tokens(self.capacity))
        group = self._oldest(packed, start)
        return self._pack(group, names or kernels_or_xla())

    def oldest_group(self, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What stands in the oldest group of the rings of sequences of which `packed` [B] tokens are packed.

        Keys and values [B, K, group, H].
        """
        group = self._oldest(packed, packed)
        return group.taken(group.key), group.taken(group.value)

    def _oldest(self, packed: jax.Array, start: jax.Array) -> _Leaving:
        first = self._slot(self.config.sink_tokens + packed)
        held, rows = jnp.full_like(first, self.config.group), self.config.group
        return _Leaving(self.keys.dense, self.values.dense, first, start, held, rows=rows, head_axis=1)

    def write_tokens(
        self, key: jax.Array, value: jax.Array, query: jax.Array, origin: jax.Array, lengths: jax.Array
    ) -> Self:
        """Add tokens without packing any: those at the positions from each sequence's length up to `lengths` [B].

        Args:
            key, value: [B, n, K, H], n at most `config.group`, the first ones at the positions `origin` [B].
            query: [B, n, N, H], read where a method scores with queries.
            origin, lengths: see above; the ring must have room for the tokens.
        """
        sinks, tail = _dense_slots(self.config, self.capacity)
        fits = jnp.minimum(lengths, self.capacity)
        last, slot = fits[:, None] - 1, jnp.arange(sinks + tail)
        # the last token that a slot of the ring has come to hold; at a position before the ring, there is none
        in_ring = last - (last - slot) % tail
        position = jnp.where(slot < sinks, jnp.where(slot <= last, slot, -1), jnp.where(in_ring >= sinks, in_ring, -1))
        written = dataclasses.replace(
            self,
            keys=Store(self._with_tokens(self.keys.dense, key, position, origin), self.keys.packed),
            values=Store(self._with_tokens(self.values.dense, value, position, origin), self.values.packed),
            lengths=fits,
            overflow=self.overflow | (lengths > self.capacity),
        )
        if self.queries is None:
            return written
        queries = self._with_tokens(self.queries, query.astype(self.dtype), written._query_positions(), origin)
        return dataclasses.replace(written, queries=queries)

    def _with_tokens(self, slots: jax.Array, tokens: jax.Array, position: jax.Array, origin: jax.Array) -> jax.Array:
        """Slots [B, K, s, H], with tokens [B, n, K, H] where `position` [B, s] is a new one's."""
        index = (position - origin[:, None])[:, None, :, None]
        new = jnp.take_along_axis(tokens.swapaxes(1, 2), index, axis=2, mode="clip")
        return jnp.where((position >= self.lengths[:, None])[:, None, :, None], new, slots)

    def _with_query(self, query: jax.Array | None, fits: jax.Array) -> jax.Array | None:
        """The most recent queries with this one [B, N, H], of the sequences for whose token there is room."""
        if self.queries is None:
            return None
        assert query is not None
        slot = jnp.where(fits, self.lengths % RECENT, RECENT)
        return write_rows(self.queries, query[:, :, None].astype(self.dtype), slot, axis=2)

    def _pack(self, leaving: _Leaving, names: Names) -> Self:
        """Prune and pack tokens."""
        if leaving.rows == 0 or self.config.packed_tokens(self.capacity) == 0:
            return self
        keys, values = _pack_leaving(self, leaving, names)
        always_fits = self.config.value_method.equal_rows
        return dataclasses.replace(
            self,
            overflow=self.overflow if always_fits else self.overflow | _overflow(values),
            keys=Store(self.keys.dense, keys),
            values=Store(self.values.dense, values),
        )

    def _compress(self, key: jax.Array, value: jax.Array, positions: jax.Array, context: Context) -> tuple[Rows, Rows]:
        """Prune and pack [B, K, n, H] at positions [B, n]; rows that are not valid hold nothing."""
        config, slots = self.config, self.config.slots(self.head_dim)
        by_key, by_value = config.key_method, config.value_method
        key, ranked = self._held_and_ranked(key, positions)
        return (
            _prune(key, ranked, context, by_key, config.k_sparsity, slots[0], rescale=False),
            _prune(value, value, context, by_value, config.v_sparsity, slots[1], rescale=config.rescale_values),
        )

    def _held_and_ranked(self, key: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, K, n, H] at positions [B, n] less the mean; and what their entries are chosen by. Of their dtype."""
        if self.key_mean is None and self.key_weight is None:
            return key, key
        held = key.astype(jnp.float32)
        if self.key_mean is not None:
            held -= self.mean_key(positions)
        ranked = held if self.key_weight is None else held * self.key_weight[:, :, None]
        return held.astype(key.dtype), ranked.astype(key.dtype)

    def _context(self, positions: jax.Array, valid: jax.Array, all_keys: Callable[[], jax.Array]) -> Context:
        """What rules see besides the entries at positions [B, n]; `all_keys` gives the keys [B, S, K, H]."""
        if self.queries is None:
            return Context(valid)
        queries = self.queries.astype(jnp.float32)
        queries = queries.reshape(self.batch, self.num_kv_heads, -1, self.head_dim)
        if not self.config.needs_attention:
            return Context(valid, queries)
        attention = _attention_received(queries, self._query_positions(), all_keys())
        return Context(valid, queries, jnp.take_along_axis(attention, positions[:, None], axis=2))

    def _query_positions(self) -> jax.Array:
        """int32 [B, 32]: the position of the query in each slot, negative where there is none."""
        last = self.lengths[:, None] - 1
        return last - (last - jnp.arange(RECENT)) % RECENT


def _prune(
    x: jax.Array, ranked: jax.Array, context: Context, method: Method, sparsity: float, slots: int, *, rescale: bool
) -> Rows:
    """Prune and pack x [B, K, n, H], keeping the entries where `ranked`, of its shape, is foremost.

    Nothing is held of the tokens that are not valid [B, n]; at sparsity 0, x comes as it is.
    """
    if sparsity == 0:
        return x
    mask = method.mask(ranked, sparsity, context)
    x = rescale_to_norm(x, mask) if rescale else x
    return bitmap.pack(x, mask & context.valid[:, None, :, None], slots=slots)


@functools.partial(jax.jit, static_argnames="names")  # so that a call outside jit does not compile each time
def _pack_leaving(cache: PackedCache, leaving: _Leaving, names: Names) -> tuple[Rows, Rows]:
    """The packed keys and values with the leaving tokens in them."""

    def run(name: str) -> tuple[Rows, Rows]:
        if name not in _PACK:
            raise NotImplementedError(f"implementation={name!r} does not pack; wanted one of {[*_PACK]}")
        return _PACK[name](cache, leaving)

    return first_that_runs(names, run)


def _pack_xla(cache: PackedCache, leaving: _Leaving) -> tuple[Rows, Rows]:
    """By the functions of `pruning` and `bitmap`, where any sequence has something to pack."""
    packed = cache.keys.packed, cache.values.packed

    def pack() -> tuple[Rows, Rows]:
        offset = jnp.arange(leaving.rows)
        positions = cache.config.sink_tokens + leaving.start[:, None] + offset
        valid = offset < leaving.held[:, None]
        context = cache._context(positions, valid, lambda: _all_keys(cache, leaving))
        compressed = cache._compress(leaving.taken(leaving.key), leaving.taken(leaving.value), positions, context)
        keys, values = (_put(p, new, leaving.start) for p, new in zip(packed, compressed, strict=True))
        return keys, values

    return lax.cond((leaving.start < packed[0].shape[2]).any(), pack, lambda: packed)


def _all_keys(cache: PackedCache, leaving: _Leaving) -> jax.Array:
    """The keys [B, S, K, H] of sequences of which some are leaving: the prompt's, or those that a step found."""
    return leaving.key if leaving.head_axis == 2 else cache._to_dense(leaving.start)[0]


def kernel_packs(config: CompressionConfig, *, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether the Pallas kernel prunes and packs such caches, on the GPUs that it runs on and unless told otherwise."""
    try:
        kernels("cuda").check_form("Triton", dtype=jnp.dtype(dtype), head_dim=head_dim)
        _check_by_magnitude(config)
    except NotImplementedError:
        return False
    return True


def packing_nbytes(
    config: CompressionConfig, tokens: int, *, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> int:
    """Bytes that packing the keys and values of `tokens` tokens works in on an NVIDIA GPU; 0 for a dense cache.

    Keys and values twice where the kernel packs them, else four times.
    """
    if config.is_dense:
        return 0
    copies = 2 if kernel_packs(config, head_dim=head_dim, dtype=dtype) else 4
    return copies * 2 * num_kv_heads * head_dim * tokens * jnp.dtype(dtype).itemsize


def _check_by_magnitude(config: CompressionConfig) -> None:
    for sparsity, method in ((config.k_sparsity, config.k_method), (config.v_sparsity, config.v_method)):
        if sparsity and method != "magnitude":
            raise NotImplementedError(f"the Triton kernel prunes by magnitude; got {method!r}")


def _pack_triton(cache: PackedCache, leaving: _Leaving, *, interpret: bool = False) -> tuple[Rows, Rows]:
    """By the Pallas kernel that lowers through Triton, in which sequences that have nothing to pack cost nothing."""
    kernel, rows = kernels("triton.prune_pack"), kernels("rows")
    config = cache.config
    _check_by_magnitude(config)
    prunes = []
    for packed, source, taken_off, rescale, weight in (
        (cache.keys.packed, leaving.key, cache.kernels_mean(), False, cache.key_weight),
        (cache.values.packed, leaving.value, None, config.rescale_values, None),
    ):
        if isinstance(packed, BitmapArray):
            prunes.append(kernel.Prune(source, rows.Packed(packed.bitmap, packed.values), taken_off, rescale, weight))
    if not prunes:
        raise NotImplementedError("the Triton kernel writes bitmap-packed rows; this cache has none")
    ranges = leaving.first, leaving.start, leaving.held
    new_rows = kernel.prune_pack(prunes, *ranges, rows=leaving.rows, head_axis=leaving.head_axis, interpret=interpret)
    written = iter(new_rows)

    def place(packed: Rows, source: jax.Array) -> Rows:
        if isinstance(packed, BitmapArray):
            new = next(written)
            return dataclasses.replace(packed, bitmap=new.bitmap, values=new.values)
        return write_rows(packed, leaving.taken(source), leaving.start, axis=2)

    return place(cache.keys.packed, leaving.key), place(cache.values.packed, leaving.value)


_PACK: dict[str, Callable[[PackedCache, _Leaving], tuple[Rows, Rows]]] = {"triton": _pack_triton, "xla": _pack_xla}
"""The implementations of prune and pack."""


def check_lengths(
    lengths: ArrayLike | Sequence[int] | None, batch: int, longest: int, *, shortest: int = 0
) -> jax.Array:
    """Lengths as int32 [batch], `longest` each if None.

    Raises ValueError for another shape, a dtype that is not integer, or (where concrete) a value outside
    [shortest, longest].
    """
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    given = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if given.shape != (batch,) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"lengths is {given.dtype}{list(given.shape)}; wanted integers [{batch}]")
    if not isinstance(given, jax.core.Tracer):
        given = np.asarray(given)
        if given.min() < shortest or given.max() > longest:
            raise ValueError(f"lengths={given.tolist()} must lie in {shortest} .. {longest}")
    return jnp.asarray(given, jnp.int32)


def _check_rows(rows: ArrayLike | Sequence[int], batch: int) -> int:
    """How many rows there are; ValueError unless they are different sequences of the batch."""
    given = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if given.ndim != 1 or given.size == 0 or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"rows is {given.dtype}{list(given.shape)}; wanted integers [n], n at least 1")
    if not isinstance(given, jax.core.Tracer):
        given = np.asarray(given)
        if given.min() < 0 or given.max() >= batch or len(np.unique(given)) < len(given):
            raise ValueError(f"rows={given.tolist()} must be different sequences in 0 .. {batch - 1}")
    return given.shape[0]


def check_cache(cache: Any) -> None:
    """Raise TypeError for what is no cache, such as the argument that is to come before or after it."""
    if not isinstance(cache, LayerCache):
        raise TypeError(f"cache is of type {type(cache).__name__}; wanted a LayerCache")


def check_kv(cache: LayerCache, key: jax.Array, value: jax.Array, wanted: tuple[int | None, ...], letters: str) -> None:
    """Raise ValueError for keys and values of another shape than `wanted`, TypeError for another dtype."""
    for name, x in (("key", key), ("value", value)):
        fits = x.ndim == len(wanted) and all(want in (None, size) for want, size in zip(wanted, x.shape, strict=True))
        if not fits:
            sizes = ", ".join("S" if size is None else str(size) for size in wanted)
            raise ValueError(f"{name} has shape {x.shape}; the cache wants {letters} = [{sizes}]")
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; the cache holds {cache.dtype}")
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key has {key.shape}; wanted the same")


def check_query(cache: LayerCache, query: jax.Array | None, leading: tuple[int, ...], letters: str) -> None:
    """Raise ValueError where a method scores with queries and there are none, or of another shape."""
    if not (isinstance(cache, PackedCache) and cache.queries is not None):
        return
    wanted = (*leading, cache.queries.shape[1], cache.head_dim)
    if query is None:
        methods = f"k_method={cache.config.k_method!r}, v_method={cache.config.v_method!r}"
        raise ValueError(f"query=None: {methods} score with queries; wanted {letters} = {list(wanted)}")
    if query.shape != wanted:
        raise ValueError(f"query has shape {query.shape}; the cache wants {letters} = {list(wanted)}")


def _check_weighing_query(cache: LayerCache, query: jax.Array | None, leading: tuple[int, ...]) -> None:
    """Raise ValueError where keys are weighed and a prompt's queries are missing, or of a shape that cannot be."""
    if not (isinstance(cache, PackedCache) and cache.key_weight is not None):
        return
    if query is None:
        raise ValueError("query=None: weigh_keys=True weighs keys by the prompt's queries; wanted [B, S, N, H]")
    fits = query.ndim == 4 and (*query.shape[:2], query.shape[3]) == (*leading, cache.head_dim)
    if not fits or query.shape[2] == 0 or query.shape[2] % cache.num_kv_heads:
        sizes = f"[{leading[0]}, {leading[1]}, a multiple of {cache.num_kv_heads}, {cache.head_dim}]"
        raise ValueError(f"query has shape {query.shape}; the cache wants [B, S, N, H] = {sizes}")


def check_dtype(given: DTypeLike) -> np.dtype[Any]:
    """The dtype of a cache, or of a model and its cache; TypeError for another, or for none at all."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"dtype={given if dtype is None else dtype.name} must be bfloat16, float16 or float32")
    return dtype


def _frequencies(config: CompressionConfig, inv_freq: ArrayLike | None, head_dim: int) -> tuple[float, ...] | None:
    """The RoPE frequencies as a static tuple where keys are centred, else None."""
    if not (config.center_keys and config.k_sparsity):
        return None
    if inv_freq is None:
        raise ValueError("inv_freq=None: center_keys=True needs the model's RoPE frequencies, [head_dim / 2]")
    if isinstance(inv_freq, jax.core.Tracer):
        raise TypeError("inv_freq is traced; wanted numbers: compute it outside of jit, or with numpy")
    if np.shape(inv_freq) != (head_dim // 2,):
        raise ValueError(f"inv_freq has shape {np.shape(inv_freq)}; wanted [{head_dim // 2}]")
    return tuple(np.asarray(inv_freq, np.float32).tolist())


# One compiled call for a layer: a model has hundreds of these arrays, and calls one by one delay its first token.
@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=["batch", "capacity", "num_kv_heads", "head_dim", "dtype", "inv_freq", "num_heads"],
)
def _empty_cache(
    config: CompressionConfig,
    *,
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: np.dtype[Any],
    inv_freq: tuple[float, ...] | None,
    num_heads: int | None,
) -> LayerCache:
    """An empty cache; see `LayerCache.init`, which checks the arguments."""
    common: dict[str, Any] = {
        "lengths": jnp.zeros(batch, jnp.int32),
        "overflow": jnp.zeros(batch, bool),
        "config": config,
        "capacity": capacity,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
    }
    if config.is_dense:
        key, value = (jnp.zeros((batch, capacity, num_kv_heads, head_dim), dtype) for _ in range(2))
        return DenseCache(key=key, value=value, **common)
    leading, (key_slots, value_slots) = (batch, num_kv_heads), config.slots(head_dim)
    return PackedCache(
        keys=_empty_store(config, config.k_sparsity, key_slots, capacity, leading, head_dim, dtype),
        values=_empty_store(config, config.v_sparsity, value_slots, capacity, leading, head_dim, dtype),
        queries=_empty_queries(config, batch, num_heads, num_kv_heads, head_dim, dtype),
        key_mean=None if inv_freq is None else jnp.zeros((*leading, head_dim), jnp.float32),
        key_weight=jnp.ones((*leading, head_dim), jnp.float32) if config.weigh_keys and config.k_sparsity else None,
        inv_freq=inv_freq,
        **common,
    )


def _dense_slots(config: CompressionConfig, capacity: int) -> tuple[int, int]:
    """Slots of the sinks, and of the ring of recent tokens: whole groups that hold residual_length + group tokens.

    Where no sequence can ever be long enough to be packed, there is a slot for each token of the capacity.
    """
    sinks = min(config.sink_tokens, capacity)
    if config.packed_tokens(capacity) == 0:
        return sinks, max(1, capacity - sinks)
    return sinks, -(-config.residual_length // config.group) * config.group + config.group


def _mean_key(cache: PackedCache, key: jax.Array) -> jax.Array:
    """float32 [B, K, H]: the mean, before RoPE, of a prompt's keys [B, S, K, H] but for the sinks and the window."""
    position = jnp.arange(key.shape[1])
    last = cache.lengths[:, None] - cache.config.residual_length
    counted = (position >= cache.config.sink_tokens) & (position < last)
    before_rope = rotate(key, -position[:, None], jnp.asarray(cache.inv_freq))
    total = jnp.sum(jnp.where(counted[..., None, None], before_rope, 0), axis=1)
    return total / jnp.maximum(counted.sum(axis=1), 1)[:, None, None]


def _key_weight(cache: PackedCache, query: jax.Array) -> jax.Array:
    """float32 [B, K, H]: `query_weight` of a prompt's last queries of [B, S, N, H]; 1 where the prompt is too short."""
    recent = min(WEIGHING, query.shape[1])
    position = cache.lengths[:, None] - recent + jnp.arange(recent)
    is_long = cache.lengths > cache.config.sink_tokens + cache.config.residual_length
    last = jnp.take_along_axis(query, position[:, :, None, None], axis=1, mode="clip")
    return query_weight(last, (position >= 0) & is_long[:, None], cache.num_kv_heads)


def _recent_queries(cache: PackedCache, query: jax.Array) -> jax.Array:
    """[B, N, 32, H]: the last queries of a prompt's [B, S, N, H], each in its slot; zero where there is none."""
    positions = cache._query_positions()[:, None, :, None]
    recent = jnp.take_along_axis(query.swapaxes(1, 2), positions, axis=2, mode="clip")
    return jnp.where(positions >= 0, recent, 0).astype(cache.dtype)


def _attention_received(queries: jax.Array, positions: jax.Array, key: jax.Array) -> jax.Array:
    """Causal attention, by token: the probabilities that queries give it, summed. It knows of no sliding window.

    Args:
        queries: float32 [B, K, G * n, H], after RoPE.
        positions: int32 [B, n], of each head's queries; negative where there is none.
        key: [B, S, K, H].

    Returns:
        float32 [B, K, S].
    """
    group = queries.shape[2] // positions.shape[1]
    position = jnp.tile(positions, (1, group))[:, None, :, None]
    exact = queries, key.astype(jnp.float32)
    scores = jnp.einsum("bkqh,bskh->bkqs", *exact, precision=lax.Precision.HIGHEST) / math.sqrt(key.shape[-1])
    visible = (jnp.arange(key.shape[1]) <= position) & (position >= 0)
    lowest = jnp.finfo(jnp.float32).min
    largest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=lowest)
    weights = jnp.where(visible, jnp.exp(scores - largest), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.sum(weights / jnp.where(total > 0, total, 1), axis=2)


def _overflow(packed: Rows) -> jax.Array:
    """bool [B]: whether a row of a sequence did not fit its slots."""
    if isinstance(packed, BitmapArray):
        return packed.overflow.any(axis=1)
    return jnp.zeros(packed.shape[0], bool)


def _empty_queries(
    config: CompressionConfig, batch: int, num_heads: int | None, num_kv_heads: int, head_dim: int, dtype: np.dtype[Any]
) -> jax.Array | None:
    if not config.needs_queries:
        return None
    if num_heads is None or num_heads < 1 or num_heads % num_kv_heads:
        methods = f"k_method={config.k_method!r}, v_method={config.v_method!r}"
        raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}, since {methods} score with queries")
    return jnp.zeros((batch, num_heads, RECENT, head_dim), dtype)


def _empty_store(
    config: CompressionConfig,
    sparsity: float,
    slots: int,
    capacity: int,
    leading: tuple[int, int],
    head_dim: int,
    dtype: np.dtype[Any],
) -> Store:
    rows = config.packed_tokens(capacity)
    dense = jnp.zeros((*leading, sum(_dense_slots(config, capacity)), head_dim), dtype)
    if sparsity == 0:
        return Store(dense, jnp.zeros((*leading, rows, head_dim), dtype))
    return Store(dense, bitmap.empty(leading, rows, head_dim, slots, dtype))


def _without_overflow(packed: Rows) -> Rows:
    if isinstance(packed, BitmapArray):
        return dataclasses.replace(packed, overflow=jnp.zeros_like(packed.overflow))
    return packed


def _put(packed: Rows, update: Rows, start: jax.Array) -> Rows:
    """Write rows [B, K, n, H] from row start [B] on; a sequence whose start lies at the end or beyond is left alone."""
    if isinstance(packed, BitmapArray):
        assert isinstance(update, BitmapArray)
        return bitmap.put(packed, update, start)
    assert isinstance(update, jax.Array)
    return write_rows(packed, update, start, axis=2)


def to_array(packed: Rows) -> jax.Array:
    """Rows as an ordinary array [B, K, S, H]."""
    return bitmap.unpack(packed) if isinstance(packed, BitmapArray) else packed
