"""The KV cache of one attention layer: a packed part, and a dense part of sink tokens and the most recent ones."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from mustafar_jax import bitmap
from mustafar_jax.bitmap import BitmapArray
from mustafar_jax.config import CompressionConfig
from mustafar_jax.pruning import METHODS, keep_count, rescale_to_norm
from mustafar_jax.rope import rotate
from mustafar_jax.writes import write_rows

_register = functools.partial(functools.partial, jax.tree_util.register_dataclass)
CACHE_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class LayerCache:
    """Keys and values of one attention layer for a batch of sequences, each of its own length. A pytree.

    `LayerCache.init` makes a `PackedCache`, or a `DenseCache` where the config prunes nothing. Everything has a static
    shape, so one compiled step serves a whole generation; donate the cache to that step and it is updated in place.

    Attributes:
        lengths: int32 [B], tokens held per sequence.
        overflow: bool [B], set where a token came for which there was no room; it was not written.
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
    dtype: jnp.dtype

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

        Raises:
            ValueError: an argument out of its range.
            TypeError: an unsupported dtype.
        """
        for name, size in (("batch", batch), ("capacity", capacity), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        dtype = jnp.dtype(dtype)
        if dtype not in CACHE_DTYPES:
            raise TypeError(f"dtype={dtype} must be bfloat16, float16 or float32")
        if config.is_dense:
            return DenseCache.empty(config, batch, capacity, num_kv_heads, head_dim, dtype)
        if head_dim % bitmap.WORD:
            raise ValueError(f"{head_dim=} must be a multiple of {bitmap.WORD} where keys or values are pruned")
        frequencies = _frequencies(config, inv_freq, head_dim)
        return PackedCache.empty(config, batch, capacity, num_kv_heads, head_dim, dtype, frequencies)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, all of them: packed and dense parts, bitmaps, means, lengths and flags."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the keys and values of a dense cache of this capacity take."""
        return 2 * self.batch * self.capacity * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The keys and values that attention sees, [B, capacity, K, H], zero from each length on; and the lengths.

        Pruned entries are zero, a key mean is added back, rescaled values are as stored.
        """
        raise NotImplementedError

    def _prefill(self, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Self:
        raise NotImplementedError

    def _append(self, key: jax.Array, value: jax.Array) -> Self:
        raise NotImplementedError


def prefill(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | None = None,
    *,
    rows: ArrayLike | None = None,
) -> LayerCache:
    """Fill a cache with a prompt's keys and values, pruning and packing what leaves the dense window.

    Args:
        cache: the cache; what its sequences (those in `rows`) held is replaced.
        key, value: [B, S, K, H] in the cache's dtype, keys after RoPE at positions 0 .. S - 1; padded on the right.
        lengths: int [B], valid tokens of each sequence, 0 .. S; all S if None.
        rows: int [B], the cache's sequences to fill, each at most once; all of them, in order, if None.

    Raises:
        ValueError: shapes, lengths or rows that do not fit the cache or each other, S above the capacity.
        TypeError: another dtype than the cache's.
    """
    batch = cache.batch if rows is None else np.shape(rows)[0]
    _check_kv(cache, key, value, (batch, None, cache.num_kv_heads, cache.head_dim), "[B, S, K, H]")
    if key.shape[1] > cache.capacity:
        raise ValueError(f"key has {key.shape[1]} tokens; the cache's capacity is {cache.capacity}")
    lengths = check_lengths(lengths, batch, key.shape[1])
    if rows is None:
        return cache._prefill(key, value, lengths)
    _check_rows(rows, cache.batch)
    part = jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], cache)._prefill(key, value, lengths)
    return jax.tree.map(lambda whole, new: whole.at[jnp.asarray(rows)].set(new), cache, part)


def append(cache: LayerCache, key: jax.Array, value: jax.Array) -> LayerCache:
    """Add one token to every sequence; where that fills a group of recent tokens, prune and pack the oldest one.

    Args:
        cache: the cache; a sequence that is at its capacity keeps its tokens and gets `overflow` set.
        key, value: [B, K, H] in the cache's dtype, the key after RoPE at position `cache.lengths`.

    Raises:
        ValueError: shapes that do not fit the cache.
        TypeError: another dtype than the cache's.
    """
    _check_kv(cache, key, value, (cache.batch, cache.num_kv_heads, cache.head_dim), "[B, K, H]")
    return cache._append(key, value)


@_register(data_fields=["key", "value", "lengths", "overflow"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class DenseCache(LayerCache):
    """A cache that prunes nothing: key and value [B, capacity, K, H], the baseline of every comparison."""

    key: jax.Array
    value: jax.Array
    lengths: jax.Array
    overflow: jax.Array
    config: CompressionConfig

    @classmethod
    def empty(
        cls, config: CompressionConfig, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> Self:
        """See `LayerCache.init`."""
        shape = (batch, capacity, num_kv_heads, head_dim)
        counts = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *counts, config)

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self.key.shape[1]

    @property
    def num_kv_heads(self) -> int:  # type: ignore[override]
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.key.shape[3]

    @property
    def dtype(self) -> jnp.dtype:  # type: ignore[override]
        return self.key.dtype

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        held = (jnp.arange(self.capacity) < self.lengths[:, None])[..., None, None]
        return jnp.where(held, self.key, 0), jnp.where(held, self.value, 0), self.lengths

    def _prefill(self, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Self:
        held = (jnp.arange(key.shape[1]) < lengths[:, None])[..., None, None]
        return dataclasses.replace(
            self,
            key=self.key.at[:, : key.shape[1]].set(jnp.where(held, key, 0)),
            value=self.value.at[:, : key.shape[1]].set(jnp.where(held, value, 0)),
            lengths=lengths,
            overflow=jnp.zeros_like(self.overflow),
        )

    def _append(self, key: jax.Array, value: jax.Array) -> Self:
        return dataclasses.replace(  # a sequence at its capacity has no row to write
            self,
            key=write_rows(self.key, key[:, None], self.lengths, axis=1),
            value=write_rows(self.value, value[:, None], self.lengths, axis=1),
            lengths=jnp.minimum(self.lengths + 1, self.capacity),
            overflow=self.overflow | (self.lengths >= self.capacity),
        )


@_register(data_fields=["dense", "packed"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Store:
    """The keys or the values of a `PackedCache`.

    Attributes:
        dense: [B, K, sinks + tail, H]; the first tokens of a sequence, then a ring of the most recent ones.
        packed: [B, K, C, H], what was pruned; an ordinary array where the config leaves this cache's sparsity at 0.
    """

    dense: jax.Array
    packed: BitmapArray | jax.Array


@_register(
    data_fields=["keys", "values", "key_mean", "lengths", "overflow"], meta_fields=["config", "capacity", "inv_freq"]
)
@dataclasses.dataclass(frozen=True)
class PackedCache(LayerCache):
    """A cache whose older tokens are pruned and packed. Head-major, so that no step transposes it.

    A token's place follows from its position in the sequence and the sequence's length alone. Of the first `length` tokens:

        positions [0, sinks)                  dense slots [0, sinks)
        positions [sinks, sinks + P)          packed rows [0, P), P = config.packed_tokens(length)
        positions [sinks + P, length)         dense slots sinks + (position - sinks) % tail

    The tail is a ring of whole groups, so a group that leaves it is contiguous.

    Attributes:
        keys, values: what is held of each.
        key_mean: float32 [B, K, H], the mean key of the prompt before RoPE, fixed by `prefill`; None unless keys are centred.
            Packed keys are what is left of a key after this mean, rotated to the key's position, was taken off.
        inv_freq: the RoPE frequencies that rotate `key_mean`; static.
    """

    keys: Store
    values: Store
    key_mean: jax.Array | None
    lengths: jax.Array
    overflow: jax.Array
    config: CompressionConfig
    capacity: int
    inv_freq: tuple[float, ...] | None

    @classmethod
    def empty(
        cls,
        config: CompressionConfig,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
        inv_freq: tuple[float, ...] | None,
    ) -> Self:
        """See `LayerCache.init`."""
        leading, rows = (batch, num_kv_heads), config.packed_tokens(capacity)

        def store(sparsity: float) -> Store:
            dense = jnp.zeros((*leading, config.sink_tokens + _tail(config), head_dim), dtype)
            if sparsity == 0:
                return Store(dense, jnp.zeros((*leading, rows, head_dim), dtype))
            return Store(dense, bitmap.empty(leading, rows, head_dim, keep_count(head_dim, sparsity), dtype))

        return cls(
            keys=store(config.k_sparsity),
            values=store(config.v_sparsity),
            key_mean=None if inv_freq is None else jnp.zeros((*leading, head_dim), jnp.float32),
            lengths=jnp.zeros(batch, jnp.int32),
            overflow=jnp.zeros(batch, bool),
            config=config,
            capacity=capacity,
            inv_freq=inv_freq,
        )

    @property
    def num_kv_heads(self) -> int:  # type: ignore[override]
        return self.keys.dense.shape[1]

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        return self.keys.dense.shape[3]

    @property
    def dtype(self) -> jnp.dtype:  # type: ignore[override]
        return self.keys.dense.dtype

    @property
    def packed_lengths(self) -> jax.Array:
        """int32 [B], packed tokens per sequence."""
        return self.config.packed_tokens(self.lengths)

    def dense_positions(self) -> jax.Array:
        """int32 [B, sinks + tail]: the position of the token in each dense slot; `lengths` or more where there is none."""
        sinks, tail = self.config.sink_tokens, _tail(self.config)
        packed = self.packed_lengths[:, None]
        # The ring's oldest token has position sinks + packed, and stands in slot packed % tail.
        recent = sinks + packed + (jnp.arange(tail) - packed) % tail
        first = jnp.broadcast_to(jnp.arange(sinks), (self.batch, sinks))
        return jnp.concatenate([first, recent], axis=1)

    def mean_key(self, positions: jax.Array) -> jax.Array:
        """What was taken off packed keys: the mean key rotated to positions [B, n]; float32 [B, K, n, H]."""
        assert self.key_mean is not None
        return rotate(self.key_mean[:, :, None], positions[:, None], jnp.asarray(self.inv_freq))

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        sinks, slots = self.config.sink_tokens, self.keys.dense.shape[2]
        position = jnp.arange(self.capacity)[None]
        is_packed = (position >= sinks) & (position < sinks + self.packed_lengths[:, None])
        place = jnp.where(is_packed, slots + position - sinks, self._slot(position))
        held = (position < self.lengths[:, None])[..., None, None]

        def gather(dense: jax.Array, packed: jax.Array) -> jax.Array:
            both = jnp.concatenate([dense, packed], axis=2).swapaxes(1, 2)
            tokens = jnp.take_along_axis(both, place[..., None, None], axis=1, mode="clip")
            return jnp.where(held, tokens, 0)

        packed_keys = _to_array(self.keys.packed)
        if self.key_mean is not None:
            mean = self.mean_key(jnp.arange(packed_keys.shape[2])[None] + sinks)
            packed_keys = (packed_keys.astype(jnp.float32) + mean).astype(self.dtype)
        values = gather(self.values.dense, _to_array(self.values.packed))
        return gather(self.keys.dense, packed_keys), values, self.lengths

    def _slot(self, position: jax.Array) -> jax.Array:
        """The dense slot that a token at this position has, or had."""
        sinks = self.config.sink_tokens
        return jnp.where(position < sinks, position, sinks + (position - sinks) % _tail(self.config))

    def _prefill(self, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Self:
        cache = dataclasses.replace(self, lengths=lengths, overflow=jnp.zeros_like(self.overflow))
        if cache.key_mean is not None:
            cache = dataclasses.replace(cache, key_mean=_mean_key(cache, key))
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        sinks, rows = self.config.sink_tokens, self.config.packed_tokens(key.shape[2])
        positions = jnp.broadcast_to(sinks + jnp.arange(rows), (self.batch, rows))
        valid = jnp.arange(rows) < cache.packed_lengths[:, None]
        leaving = slice(sinks, sinks + rows)
        packed_key, packed_value = cache._compress(key[:, :, leaving], value[:, :, leaving], positions, valid)
        start = jnp.zeros_like(lengths)
        return dataclasses.replace(
            cache,
            keys=Store(cache._dense_part(key), _put(_cleared(self.keys.packed), packed_key, start)),
            values=Store(cache._dense_part(value), _put(_cleared(self.values.packed), packed_value, start)),
        )

    def _dense_part(self, x: jax.Array) -> jax.Array:
        """The sinks and recent tokens of a prompt [B, K, S, H], each in its slot; zero where a slot holds none."""
        positions = self.dense_positions()
        tokens = jnp.take_along_axis(x, positions[:, None, :, None], axis=2, mode="clip")
        return jnp.where((positions < self.lengths[:, None])[:, None, :, None], tokens, 0)

    def _append(self, key: jax.Array, value: jax.Array) -> Self:
        fits = self.lengths < self.capacity
        slot = jnp.where(fits, self._slot(self.lengths), self.keys.dense.shape[2])
        written = dataclasses.replace(
            self,
            keys=dataclasses.replace(self.keys, dense=write_rows(self.keys.dense, key[:, :, None], slot, axis=2)),
            values=dataclasses.replace(self.values, dense=write_rows(self.values.dense, value[:, :, None], slot, axis=2)),
            lengths=self.lengths + fits,
            overflow=self.overflow | ~fits,
        )
        if self.config.packed_tokens(self.capacity) == 0:
            return written
        full = written.packed_lengths > self.packed_lengths
        start = self.packed_lengths
        return lax.cond(full.any(), lambda cache: cache._pack_oldest(start, full), lambda cache: cache, written)

    def _pack_oldest(self, start: jax.Array, full: jax.Array) -> Self:
        """Pack the tail's oldest group into rows start .. start + group - 1 of the sequences that are full."""
        offsets = jnp.arange(self.config.group)
        positions = self.config.sink_tokens + start[:, None] + offsets
        slots = self._slot(positions)[:, None, :, None]
        key, value = (jnp.take_along_axis(store.dense, slots, axis=2) for store in (self.keys, self.values))
        valid = jnp.broadcast_to(full[:, None], positions.shape)
        packed_key, packed_value = self._compress(key, value, positions, valid)
        start = jnp.where(full, start, self.config.packed_tokens(self.capacity))
        return dataclasses.replace(
            self,
            keys=dataclasses.replace(self.keys, packed=_put(self.keys.packed, packed_key, start)),
            values=dataclasses.replace(self.values, packed=_put(self.values.packed, packed_value, start)),
        )

    def _compress(
        self, key: jax.Array, value: jax.Array, positions: jax.Array, valid: jax.Array
    ) -> tuple[BitmapArray | jax.Array, BitmapArray | jax.Array]:
        """Prune and pack [B, K, n, H] at positions [B, n]; rows that are not valid hold nothing."""
        config, valid = self.config, valid[:, None, :, None]
        if config.k_sparsity:
            if self.key_mean is not None:
                key = (key.astype(jnp.float32) - self.mean_key(positions)).astype(key.dtype)
            mask = METHODS[config.k_method](key, config.k_sparsity)
            key = bitmap.pack(key, mask & valid, slots=keep_count(self.head_dim, config.k_sparsity))
        if config.v_sparsity:
            mask = METHODS[config.v_method](value, config.v_sparsity)
            value = rescale_to_norm(value, mask) if config.rescale_values else value
            value = bitmap.pack(value, mask & valid, slots=keep_count(self.head_dim, config.v_sparsity))
        return key, value


def check_lengths(lengths: ArrayLike | None, batch: int, longest: int, *, shortest: int = 0) -> jax.Array:
    """Lengths as int32 [batch], `longest` each if None.

    Raises ValueError for another shape, a dtype that is not integer, or (where concrete) a value outside
    [shortest, longest].
    """
    if lengths is None:
        return jnp.full(batch, longest, jnp.int32)
    if np.shape(lengths) != (batch,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(f"lengths is {jnp.result_type(lengths)}{list(np.shape(lengths))}; wanted integers [{batch}]")
    if not isinstance(lengths, jax.core.Tracer):
        given = np.asarray(lengths)
        if given.min() < shortest or given.max() > longest:
            raise ValueError(f"lengths={given.tolist()} must lie in {shortest} .. {longest}")
    return jnp.asarray(lengths, jnp.int32)


def _check_rows(rows: ArrayLike, batch: int) -> None:
    if isinstance(rows, jax.core.Tracer):
        return
    given = np.asarray(rows)
    if given.min() < 0 or given.max() >= batch or len(np.unique(given)) < len(given):
        raise ValueError(f"rows={given.tolist()} must be different sequences in 0 .. {batch - 1}")


def _check_kv(cache: LayerCache, key: jax.Array, value: jax.Array, wanted: tuple[int | None, ...], letters: str) -> None:
    for name, x in (("key", key), ("value", value)):
        fits = x.ndim == len(wanted) and all(want in (None, size) for want, size in zip(wanted, x.shape, strict=True))
        if not fits:
            sizes = ", ".join("S" if size is None else str(size) for size in wanted)
            raise ValueError(f"{name} has shape {x.shape}; the cache wants {letters} = [{sizes}]")
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; the cache holds {cache.dtype}")
    if key.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}, key has {key.shape}; wanted the same")


def _frequencies(config: CompressionConfig, inv_freq: ArrayLike | None, head_dim: int) -> tuple[float, ...] | None:
    """The RoPE frequencies as a static tuple where keys are centred, else None."""
    if not (config.center_keys and config.k_sparsity):
        return None
    if inv_freq is None:
        raise ValueError("inv_freq=None: center_keys=True needs the model's RoPE frequencies, [head_dim / 2]")
    if np.shape(inv_freq) != (head_dim // 2,):
        raise ValueError(f"inv_freq has shape {np.shape(inv_freq)}; wanted [{head_dim // 2}]")
    return tuple(np.asarray(inv_freq, np.float32).tolist())


def _tail(config: CompressionConfig) -> int:
    """Slots of the ring of recent tokens: whole groups that hold residual_length + group tokens."""
    return -(-config.residual_length // config.group) * config.group + config.group


def _mean_key(cache: PackedCache, key: jax.Array) -> jax.Array:
    """float32 [B, K, H]: the mean, before RoPE, of the prompt's keys [B, S, K, H] that are neither sinks nor in the window."""
    position = jnp.arange(key.shape[1])
    last = cache.lengths[:, None] - cache.config.residual_length
    counted = (position >= cache.config.sink_tokens) & (position < last)
    before_rope = rotate(key, -position[:, None], jnp.asarray(cache.inv_freq))
    total = jnp.sum(jnp.where(counted[..., None, None], before_rope, 0), axis=1)
    return total / jnp.maximum(counted.sum(axis=1), 1)[:, None, None]


def _cleared(packed: BitmapArray | jax.Array) -> BitmapArray | jax.Array:
    return jax.tree.map(jnp.zeros_like, packed)


def _put(packed: BitmapArray | jax.Array, update: BitmapArray | jax.Array, start: jax.Array) -> BitmapArray | jax.Array:
    """Write rows [B, K, n, H] from row start [B] on; a sequence whose start lies at the end or beyond is left alone."""
    if isinstance(packed, BitmapArray):
        assert isinstance(update, BitmapArray)
        return bitmap.put(packed, update, start)
    assert isinstance(update, jax.Array)
    return write_rows(packed, update, start, axis=2)


def _to_array(packed: BitmapArray | jax.Array) -> jax.Array:
    return bitmap.unpack(packed) if isinstance(packed, BitmapArray) else packed
