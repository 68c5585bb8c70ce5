"""The KV cache of one attention layer: a packed part, and a dense part of sink tokens and the most recent ones."""

import dataclasses
import functools
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
from mustafar_jax.pruning import METHODS, keep_count, rescale_to_norm
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
        if not isinstance(config, CompressionConfig):
            raise TypeError(f"{config=} must be a CompressionConfig")
        sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if not isinstance(size, int | np.integer):
                raise TypeError(f"{name}={size!r} must be an integer")
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise TypeError(f"dtype={dtype} must be bfloat16, float16 or float32")
        if head_dim % bitmap.WORD and not config.is_dense:
            raise ValueError(f"{head_dim=} must be a multiple of {bitmap.WORD} where keys or values are pruned")
        common: dict[str, Any] = {
            "lengths": jnp.zeros(batch, jnp.int32),
            "overflow": jnp.zeros(batch, bool),
            "config": config,
            "dtype": dtype,
            **{name: size for name, size in sizes.items() if name != "batch"},
        }
        if config.is_dense:
            key, value = (jnp.zeros((batch, capacity, num_kv_heads, head_dim), dtype) for _ in range(2))
            return DenseCache(key=key, value=value, **common)
        frequencies = _frequencies(config, inv_freq, head_dim)
        leading = (batch, num_kv_heads)
        return PackedCache(
            keys=_empty_store(config, config.k_sparsity, capacity, leading, head_dim, dtype),
            values=_empty_store(config, config.v_sparsity, capacity, leading, head_dim, dtype),
            key_mean=None if frequencies is None else jnp.zeros((*leading, head_dim), jnp.float32),
            inv_freq=frequencies,
            **common,
        )

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

    def _append(self, key: jax.Array, value: jax.Array) -> "LayerCache":
        raise NotImplementedError


def prefill(
    cache: LayerCache,
    key: jax.Array,
    value: jax.Array,
    lengths: ArrayLike | Sequence[int] | None = None,
    *,
    rows: ArrayLike | Sequence[int] | None = None,
) -> LayerCache:
    """Fill a cache with a prompt's keys and values, pruning and packing what leaves the dense window.

    Args:
        cache: the cache; what its sequences (those in `rows`) held is replaced.
        key, value: [B, S, K, H] in the cache's dtype, keys after RoPE at positions 0 .. S - 1; padded on the right.
        lengths: int [B], valid tokens of each sequence, 0 .. S; all S if None.
        rows: int [B], the cache's sequences to fill, each at most once; all of them, in order, if None. The named
            sequences' part of the cache is copied once.

    Raises:
        ValueError: shapes, lengths or rows that do not fit the cache or each other, S above the capacity.
        TypeError: another dtype than the cache's.
    """
    batch = cache.batch if rows is None else _check_rows(rows, cache.batch)
    _check_kv(cache, key, value, (batch, None, cache.num_kv_heads, cache.head_dim), "[B, S, K, H]")
    if key.shape[1] > cache.capacity:
        raise ValueError(f"key has {key.shape[1]} tokens; the cache's capacity is {cache.capacity}")
    lengths = check_lengths(lengths, batch, key.shape[1])
    if rows is None:
        return cache._prefill(key, value, lengths)
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
    with jax.named_scope("append"):  # a profile shows it by this name
        return cache._append(key, value)


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


@_register(data_fields=["keys", "values", "key_mean", *_COUNTS], meta_fields=["inv_freq", *_STATIC])
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
            centred. An entry that a packed key does not hold stands for this mean's, rotated to the key's position.
        inv_freq: the RoPE frequencies that rotate `key_mean`; static.
    """

    keys: Store
    values: Store
    key_mean: jax.Array | None
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

    def unpack_keys(self, packed: Rows, positions: jax.Array) -> jax.Array:
        """Packed keys [B, K, n, H] at positions [B or 1, n] as attention sees them; float32 where they are centred."""
        if self.key_mean is None or not isinstance(packed, BitmapArray):
            return to_array(packed)
        return jnp.where(bitmap.held(packed), bitmap.unpack(packed), self.mean_key(positions))

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

        positions = sinks + jnp.arange(self.keys.packed.shape[2])[None]
        packed_keys = self.unpack_keys(self.keys.packed, positions).astype(self.dtype)
        values = gather(self.values.dense, to_array(self.values.packed))
        return gather(self.keys.dense, packed_keys), values, self.lengths

    def _slot(self, position: jax.Array) -> jax.Array:
        """The dense slot that a token at this position has, or had."""
        sinks, tail = _dense_slots(self.config, self.capacity)
        return jnp.where(position < sinks, position, sinks + (position - sinks) % tail)

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
            keys=Store(cache._dense_part(key), _put(_without_overflow(self.keys.packed), packed_key, start)),
            values=Store(cache._dense_part(value), _put(_without_overflow(self.values.packed), packed_value, start)),
        )

    def _dense_part(self, x: jax.Array) -> jax.Array:
        """The sinks and recent tokens of a prompt [B, K, S, H], each in its slot; zero where a slot holds none."""
        positions = self.dense_positions()
        tokens = jnp.take_along_axis(x, positions[:, None, :, None], axis=2, mode="clip")
        return jnp.where((positions < self.lengths[:, None])[:, None, :, None], tokens, 0)

    def _append(self, key: jax.Array, value: jax.Array) -> "PackedCache":
        fits = self.lengths < self.capacity
        stores = (self.keys, key), (self.values, value)
        slot = jnp.where(fits, self._slot(self.lengths), self.keys.dense.shape[2])
        key, value = (write_rows(store.dense, token[:, :, None], slot, axis=2) for store, token in stores)
        written = dataclasses.replace(
            self,
            keys=Store(key, self.keys.packed),
            values=Store(value, self.values.packed),
            lengths=self.lengths + fits,
            overflow=self.overflow | ~fits,
        )
        if self.config.packed_tokens(self.capacity) == 0:
            return written
        full = written.packed_lengths > self.packed_lengths
        return _pack_oldest_where(full, written, self.packed_lengths)

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
            keys=Store(self.keys.dense, _put(self.keys.packed, packed_key, start)),
            values=Store(self.values.dense, _put(self.values.packed, packed_value, start)),
        )

    def _compress(self, key: jax.Array, value: jax.Array, positions: jax.Array, valid: jax.Array) -> tuple[Rows, Rows]:
        """Prune and pack [B, K, n, H] at positions [B, n]; rows that are not valid hold nothing."""
        config = self.config
        ranked = key
        if self.key_mean is not None:
            ranked = (key.astype(jnp.float32) - self.mean_key(positions)).astype(key.dtype)
        return (
            _prune(key, ranked, valid, config.k_method, config.k_sparsity, rescale=False),
            _prune(value, value, valid, config.v_method, config.v_sparsity, rescale=config.rescale_values),
        )


def _prune(x: jax.Array, ranked: jax.Array, valid: jax.Array, method: str, sparsity: float, *, rescale: bool) -> Rows:
    """Prune and pack x [B, K, n, H], keeping the entries where `ranked`, of its shape, is foremost.

    Nothing is held of the tokens that are not valid [B, n]; at sparsity 0, x comes as it is.
    """
    if sparsity == 0:
        return x
    mask = METHODS[method](ranked, sparsity)
    x = rescale_to_norm(x, mask) if rescale else x
    return bitmap.pack(x, mask & valid[:, None, :, None], slots=keep_count(x.shape[-1], sparsity))


@jax.jit  # so that a call outside jit does not compile the two branches each time
def _pack_oldest_where(full: jax.Array, cache: PackedCache, start: jax.Array) -> PackedCache:
    """Pack the oldest recent group of the sequences whose group is full [B], if there are any."""
    return lax.cond(full.any(), lambda: cache._pack_oldest(start, full), lambda: cache)


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


def _check_kv(
    cache: LayerCache, key: jax.Array, value: jax.Array, wanted: tuple[int | None, ...], letters: str
) -> None:
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


def _empty_store(
    config: CompressionConfig,
    sparsity: float,
    capacity: int,
    leading: tuple[int, int],
    head_dim: int,
    dtype: np.dtype[Any],
) -> Store:
    rows = config.packed_tokens(capacity)
    dense = jnp.zeros((*leading, sum(_dense_slots(config, capacity)), head_dim), dtype)
    if sparsity == 0:
        return Store(dense, jnp.zeros((*leading, rows, head_dim), dtype))
    return Store(dense, bitmap.empty(leading, rows, head_dim, keep_count(head_dim, sparsity), dtype))


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
