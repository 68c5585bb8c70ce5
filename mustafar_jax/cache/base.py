"""What every cache is: lengths, sizes, and the two ways to fill it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from mustafar_jax.backends.registry import Candidates, Implementation, candidates
from mustafar_jax.cache.checks import check_dtype, check_kv, check_lengths, check_rows, check_sizes
from mustafar_jax.config import CompressionConfig
from mustafar_jax.rows import Rows

COUNTS = ["lengths", "overflow"]
"""The arrays of every cache, as fields of its pytree."""

STATIC = ["config", "capacity", "head_dim", "dtype"]
"""The static fields of every cache."""


class CacheShape(NamedTuple):
    """The sizes of a cache, as in `LayerCache.init`. Hashable: static under `jax.jit`."""

    batch: int
    capacity: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]

    def fields(self) -> dict[str, Any]:
        """What every cache of this shape begins with: no tokens, and its static fields."""
        counts = {"lengths": jnp.zeros(self.batch, jnp.int32), "overflow": jnp.zeros(self.batch, bool)}
        return counts | {name: getattr(self, name) for name in STATIC if name != "config"}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LayerCache:
    """Keys and values of one attention layer for a batch of sequences, each of its own length. A pytree.

    `LayerCache.init` makes a `PackedCache`, or a `DenseCache` where the config neither prunes nor codes. Everything has
    a static shape, so one compiled step serves a whole generation; donate the cache to that step and it is updated in
    place.

    Attributes:
        lengths: int32 [B], tokens held per sequence.
        overflow: bool [B], set where a token came for which there was no room; it was not written. Also where a value
            needed more than `config.v_slots`; what did not fit of it is missing.
        config: how the cache is compressed.
        capacity: tokens that fit per sequence: sinks, packed and recent ones together.
        head_dim, dtype: of the keys and values.

    `batch`, `num_kv_heads` and the bytes come from the arrays' shapes, so they are also right where the arrays have
    axes before the batch's, as under `jax.vmap` and for caches stacked over layers, or fewer heads on each device.
    """

    lengths: jax.Array
    overflow: jax.Array
    config: CompressionConfig
    capacity: int
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
            head_dim: entries of a key or value vector; a multiple of 32 where they are pruned.
            dtype: bfloat16, float16 or float32.
            inv_freq: the model's RoPE frequencies, concrete float32 [head_dim / 2]; needed for `center_keys`.
                `check_rope` tells whether keys follow them.
            num_heads: query heads, a multiple of the KV heads; needed for methods that score with queries.

        Raises:
            ValueError: an argument out of its range.
            TypeError: an argument of another type, an unsupported dtype.
        """
        if not isinstance(config, CompressionConfig):
            raise TypeError(f"{config=} must be a CompressionConfig")
        check_sizes(batch=batch, capacity=capacity, num_kv_heads=num_kv_heads, head_dim=head_dim)
        shape = CacheShape(batch, capacity, num_kv_heads, head_dim, check_dtype(dtype))
        kind = next(kind for kind in LayerCache.__subclasses__() if kind._holds(config))
        return kind._empty(config, shape, inv_freq, num_heads)

    @property
    def batch(self) -> int:
        """Sequences; of stacked caches, those of each."""
        return self.lengths.shape[-1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes held, all of them: packed and dense parts, bitmaps, scales, means, weights, lengths, flags."""
        parts = jax.tree.leaves(self, is_leaf=lambda part: isinstance(part, Rows))
        return sum(part.nbytes if isinstance(part, Rows) else part.size * part.dtype.itemsize for part in parts)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the keys and values of a dense cache of this capacity take."""
        return 2 * self.lengths.size * self.capacity * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def __repr__(self) -> str:
        """One line: what it is, not what it holds."""
        batch, heads = (self._size(name) for name in ("batch", "num_kv_heads"))
        sizes = f"batch={batch}, capacity={self.capacity}, num_kv_heads={heads}, head_dim={self.head_dim}"
        return f"{type(self).__name__}({sizes}, dtype={np.dtype(self.dtype).name}, {self.config})"

    def _size(self, name: str) -> int | None:
        """What arrays' shapes tell; None in a tree that holds something else in their place."""
        try:
            return int(getattr(self, name))
        except (AttributeError, IndexError):
            return None

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The keys and values that attention sees, [B, capacity, K, H], zero from each length on; and the lengths.

        Pruned entries are zero, a key mean is added back (keys are then float32), rescaled values are as stored, coded
        keys or values are what their codes stand for (float32).
        """
        raise NotImplementedError

    @staticmethod
    def _holds(config: CompressionConfig) -> bool:
        """Whether this kind of cache is the one for a config."""
        raise NotImplementedError

    @classmethod
    def _empty(
        cls, config: CompressionConfig, shape: CacheShape, inv_freq: ArrayLike | None, num_heads: int | None
    ) -> "LayerCache":
        """See `init`, which has checked the shape."""
        raise NotImplementedError

    def _check_queries(self, query: jax.Array | None, leading: tuple[int, ...], *, letters: str) -> None:
        """Raise ValueError where a method scores with queries and there are none, or of a shape that cannot be.

        Args:
            query: [..., N, H].
            leading: its first axes as they should be.
            letters: its axes, in words.
        """

    def _check_prompt_queries(self, query: jax.Array | None, leading: tuple[int, ...]) -> None:
        """`_check_queries` of a prompt's [B, S, N, H]; also where keys are weighed by them."""

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        raise NotImplementedError

    def _append(
        self,
        key: jax.Array,
        value: jax.Array,
        query: jax.Array | None,
        packers: Candidates,
        there: jax.Array | None = None,
    ) -> Self:
        """See `append`; `there`, bool [B], says which sequences get their token, all if None."""
        raise NotImplementedError

    def _truncated(self, lengths: jax.Array) -> Self:
        """The cache with its first tokens alone, int32 [B]; see `copies.truncate`, which has checked that it can be."""
        raise NotImplementedError

    def _extend(
        self, key: jax.Array, value: jax.Array, count: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        """The cache with the first `count` [B] of tokens [B, n, ..], and what leaves the dense part packed."""
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
    """Replace what a cache holds by a prompt's keys and values, pruning and packing what leaves the dense window.

    `attend` adds to what a cache holds.

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
            sequence of names (the first that can is taken), or None for the best that works here. What is packed is
            the same. `backends.registry.packers` says which of these go with a name for attention.

    Raises:
        ValueError: shapes, lengths or rows that do not fit the cache or each other, S above the capacity, an unknown
            implementation.
        TypeError: another dtype than the cache's; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    packers = candidates("pack", implementation)
    batch = cache.batch if rows is None else check_rows(rows, cache.batch)
    check_kv(key, value, cache.dtype, (batch, None, cache.num_kv_heads, cache.head_dim), "[B, S, K, H]")
    cache._check_prompt_queries(query, key.shape[:2])
    if key.shape[1] > cache.capacity:
        raise ValueError(f"key has {key.shape[1]} tokens; the cache's capacity is {cache.capacity}")
    given = jnp.asarray(check_lengths(lengths, batch, key.shape[1]))
    lengths = jnp.clip(given, 0, key.shape[1])  # under jit they are not known to lie there
    part = cache if rows is None else jax.tree.map(lambda leaf: leaf[jnp.asarray(rows)], cache)
    part = part._prefill(key, value, lengths, query, packers)
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
        query: [B, N, H], the token's own after RoPE, needed (and read) where a method scores with recent queries. Where
            keys are weighed, it is read until the first tokens are packed: without it the weights are the prompt's, or
            all 1 where there was none.
        implementation: as in `prefill`.

    Raises:
        ValueError: shapes that do not fit the cache, an unknown implementation.
        TypeError: another dtype than the cache's; no cache.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    packers = candidates("pack", implementation)
    check_kv(key, value, cache.dtype, (cache.batch, cache.num_kv_heads, cache.head_dim), "[B, K, H]")
    cache._check_queries(query, key.shape[:1], letters="[B, N, H]")
    with jax.named_scope("append"):  # a profile shows it by this name
        return cache._append(key, value, query, packers)


def check_cache(cache: Any) -> None:
    """Raise TypeError for what is no cache, such as the argument that is to come before or after it.

    ValueError for stacked caches.
    """
    if not isinstance(cache, LayerCache):
        raise TypeError(f"cache is of type {type(cache).__name__}; wanted a LayerCache")
    if len(cache.lengths.shape) != 1:
        raise ValueError(
            f"cache has lengths of shape {list(cache.lengths.shape)}, as stacked caches have; wanted one cache, [B]: "
            f"take one by jax.tree.map, or all by jax.vmap or jax.lax.scan"
        )
