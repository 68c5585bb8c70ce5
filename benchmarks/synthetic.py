"""Caches full of random data, made in a moment: no prompt is pruned and packed for them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

import mustafar_jax as mj
from mustafar_jax import layout
from mustafar_jax.cache import DenseCache, PackedCache, Store
from mustafar_jax.pruning import magnitude_mask
from mustafar_jax.rows import Rows

DTYPE = jnp.bfloat16
THETA = 500000.0

MASKS = ("random", "log-normal", "sinks", "half", "words")
"""Which entries are held.

random: any, alike. log-normal: by magnitudes whose channels have log-normal scales with sigma 1. half: a random half of
each head's channels is never held. words: the upper half of all channels is never held, so that half of a bitmap's
words are empty. sinks: any, and the keys of the first four packed tokens are 8 times as large.
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One query token per sequence against a cache of `tokens`.

    Attributes:
        name: of the shape.
        batch: sequences.
        kv_heads: KV heads.
        group: query heads per KV head.
        tokens: that each sequence's cache holds.
        head_dim: entries of a key or value.
    """

    name: str
    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int = 128

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense keys and values."""
        return 2 * self.batch * self.kv_heads * self.tokens * self.head_dim * 2

    @property
    def inv_freq(self) -> np.ndarray:
        """RoPE's frequencies, [head_dim / 2]."""
        return THETA ** (-np.arange(0, self.head_dim, 2) / self.head_dim)

    def describe(self) -> dict[str, Any]:
        """The first fields of a row."""
        fields = dataclasses.asdict(self)
        return {"shape": fields.pop("name")} | fields


def scales(mask: str, shape: Shape) -> jax.Array:
    """For `full_cache`: one of `MASKS` as scales of channels; float32 [2, kv_heads, head_dim], keys and values."""
    size, key = (2, shape.kv_heads, shape.head_dim), jax.random.key(5)
    if mask == "log-normal":
        return jnp.exp(jax.random.normal(key, size))
    if mask == "half":
        ranks = jnp.argsort(jnp.argsort(jax.random.uniform(key, size)))
        return (ranks < shape.head_dim // 2).astype(jnp.float32)
    if mask == "words":
        return jnp.broadcast_to((jnp.arange(shape.head_dim) < shape.head_dim // 2).astype(jnp.float32), size)
    return jnp.ones(size)


def query(shape: Shape) -> jax.Array:
    """Random queries [B, N, H]."""
    return jax.random.normal(jax.random.key(2), (shape.batch, shape.kv_heads * shape.group, shape.head_dim), DTYPE)


def empty_cache(
    shape: Shape, config: mj.CompressionConfig, capacity: int | None = None, dtype: DTypeLike = DTYPE
) -> mj.LayerCache:
    """A cache with room for `capacity` tokens, or for those of the shape."""
    return mj.LayerCache.init(
        config,
        batch=shape.batch,
        capacity=capacity or shape.tokens,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        inv_freq=shape.inv_freq,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def full_cache(
    shape: Shape, config: mj.CompressionConfig, scales: jax.Array, sink: jax.Array | float = 1.0
) -> mj.LayerCache:
    """A cache that holds `shape.tokens` of each sequence.

    Args:
        shape, config: of the cache.
        scales: of channels, by which entries are chosen: float32 [2, kv_heads, head_dim].
        sink: factor on the first four packed keys of a sequence.
    """
    lengths = jnp.full(shape.batch, shape.tokens, jnp.int32)
    return filled(empty_cache(shape, config), lengths, seed_of(0), scales, sink)


def seed_of(number: int) -> jax.Array:
    """A key of `jax.random` for all that is made here: of a kind that compiles in a fraction of the time."""
    return jax.random.key(number, impl="unsafe_rbg")


def filled_like(like: mj.LayerCache, lengths: jax.Array, seed: jax.Array) -> mj.LayerCache:
    """A cache of random rows, made a sequence at a time: temporaries are those of one, however large the batch is.

    Args:
        like: a cache, or its shapes as `jax.eval_shape` gives them.
        lengths: int32 [B], tokens that it is to hold.
        seed: see `seed_of`.
    """

    def one(sequence: tuple[jax.Array, jax.Array]) -> mj.LayerCache:
        length, seed = sequence
        empty = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), like)
        return filled(empty, length[None], seed, jnp.ones((2, like.num_kv_heads, like.head_dim)))

    cache = lax.map(one, (lengths, jax.random.split(seed, like.batch)))
    return jax.tree.map(lambda leaf: jnp.squeeze(leaf, 1), cache)


def filled(
    cache: mj.LayerCache, lengths: jax.Array, seed: jax.Array, scales: jax.Array, sink: jax.Array | float = 1.0
) -> mj.LayerCache:
    """The cache with random rows everywhere, of its own formats, and random statistics, where it has some.

    Args:
        cache: an empty one.
        lengths: int32 [B], tokens that it is to hold.
        seed: see `seed_of`.
        scales, sink: as in `full_cache`.
    """
    seeds = jax.random.split(seed, 5)
    if isinstance(cache, DenseCache):
        key, value = (jax.random.normal(seed, cache.key.shape, cache.dtype) for seed in seeds[:2])
        return dataclasses.replace(cache, key=key, value=value, lengths=lengths)
    assert isinstance(cache, PackedCache)
    mean, norm, queries = cache.key_mean, cache.query_norm, cache.queries
    sparsities = cache.config.removed(cache.head_dim)
    return dataclasses.replace(
        cache,
        keys=_filled_store(cache.keys, seeds[0], sparsities[0], scales[0], sink),
        values=_filled_store(cache.values, seeds[1], sparsities[1], scales[1], 1.0),
        key_mean=None if mean is None else 0.5 * jax.random.normal(seeds[2], mean.shape),
        query_norm=None if norm is None else jax.random.uniform(seeds[3], norm.shape, minval=0.5, maxval=1.5),
        queries=None if queries is None else jax.random.normal(seeds[4], queries.shape, queries.dtype),
        lengths=lengths,
    )


def _filled_store(store: Store, seed: jax.Array, sparsity: float, scales: jax.Array, sink: jax.Array | float) -> Store:
    of_dense, of_packed = jax.random.split(seed)
    dense = jax.random.normal(of_dense, store.dense.shape, store.dense.dtype)
    room = store.packed.slots / store.packed.head_dim  # may be less than an unequal rule keeps on average
    return Store(dense, random_rows(store.packed, of_packed, max(sparsity, 1 - room), scales, sink))


def random_rows(like: Rows, seed: jax.Array, sparsity: float, scales: jax.Array, sink: jax.Array | float = 1.0) -> Rows:
    """Rows [B, K, S, H], each of which holds exactly as many entries as the per-token rules keep.

    Codes are any alike, and scales so that entries are about as large as plain ones.

    Args:
        like: rows of the wanted shape and kind.
        seed: a key of `jax.random`.
        sparsity: the fraction removed.
        scales: [K, H], of channels.
        sink: factor on the first four rows.
    """
    of_mask, of_values = jax.random.split(seed)
    rows = _random_codes(like, of_values) if like.codec.bits else _random_numbers(like, of_values, sink)
    if like.bitmap is None:
        return rows
    dtype = like.format.dtype
    magnitudes = jax.random.normal(of_mask, like.shape, dtype) * scales[:, None].astype(dtype)
    return dataclasses.replace(rows, bitmap=layout.to_words(magnitude_mask(magnitudes, sparsity)))


def _random_numbers(like: Rows, seed: jax.Array, sink: jax.Array | float) -> Rows:
    payload = jax.random.normal(seed, like.payload.shape, like.dtype)
    if like.bitmap is not None:
        payload = payload.at[:, :, 0, :, :4].multiply(jnp.asarray(sink, like.dtype))
    return dataclasses.replace(like, payload=payload)


def _random_codes(like: Rows, seed: jax.Array) -> Rows:
    assert like.codec.bits
    assert like.scale is not None
    of_codes, of_scales = jax.random.split(seed)
    every = jnp.arange(2**like.codec.bits, dtype=jnp.uint8)
    usual = 1 / jnp.std(like.codec.decode(every, jnp.ones((), jnp.bfloat16)))
    scale = usual * jax.random.uniform(of_scales, like.scale.shape, minval=0.75, maxval=1.25)
    payload = jax.random.bits(of_codes, like.payload.shape, jnp.uint32)
    return dataclasses.replace(like, payload=payload, scale=scale.astype(like.scale.dtype))
