"""What every cache is: lengths, sizes, and where it is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from mustafar_jax.backends.registry import Candidates
from mustafar_jax.cache.checks import check_dtype, check_sizes
from mustafar_jax.config import CompressionConfig
from mustafar_jax.layout import Dealt
from mustafar_jax.rows import Rows
from mustafar_jax.sharding import CacheSharding, placed

COUNTS = ["lengths", "overflow"]
"""The arrays of every cache, as fields of its pytree."""

STATIC = ["config", "capacity", "head_dim", "dtype"]
"""What every cache is, in static fields."""

META = [*STATIC, "sharding"]
"""All static fields of every cache: what it is, and where."""


Spec = Callable[..., Any]
"""From the logical axes of an array to its spec, as `CacheSharding.spec`."""

C = TypeVar("C", bound="LayerCache")


class CacheShape(NamedTuple):
    """The sizes of a cache, as in `LayerCache.init`. Hashable: static under `jax.jit`."""

    batch: int
    capacity: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]
    sharding: CacheSharding | None = None

    @property
    def held_heads(self) -> int:
        """KV heads that the arrays have: more than there are where several devices hold one."""
        return self.num_kv_heads * (1 if self.sharding is None else self.sharding.repeats)

    def fields(self) -> dict[str, Any]:
        """What every cache of this shape begins with: no tokens, and its static fields."""
        counts = {"lengths": jnp.zeros(self.batch, jnp.int32), "overflow": jnp.zeros(self.batch, bool)}
        return counts | {name: getattr(self, name) for name in META if name != "config"}


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
        sharding: how it is spread over the devices of a mesh; None leaves that to the compiler.

    `batch`, `num_kv_heads` and the bytes come from the arrays' shapes, so they are also right where the arrays have
    axes before the batch's, as under `jax.vmap` and for caches stacked over layers, or fewer heads on each device.
    """

    lengths: jax.Array
    overflow: jax.Array
    config: CompressionConfig
    capacity: int
    head_dim: int
    dtype: np.dtype[Any]
    sharding: CacheSharding | None = None

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
        sharding: CacheSharding | Mesh | None = None,
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
            sharding: how to spread it over devices; of a mesh with axes of `sharding.AXES`, by those. Each device makes
                its own part.

        Raises:
            ValueError: an argument out of its range; sizes or a config that the mesh cannot split.
            TypeError: an argument of another type, an unsupported dtype.
        """
        if not isinstance(config, CompressionConfig):
            raise TypeError(f"{config=} must be a CompressionConfig")
        check_sizes(batch=batch, capacity=capacity, num_kv_heads=num_kv_heads, head_dim=head_dim)
        spread = None if sharding is None else _for_cache(sharding, config, batch, num_kv_heads)
        shape = CacheShape(batch, capacity, num_kv_heads, head_dim, check_dtype(dtype), spread)
        kind = next(kind for kind in LayerCache.__subclasses__() if kind._holds(config))
        return kind._empty(config, shape, inv_freq, num_heads)

    def partition_specs(self, sharding: CacheSharding | None = None) -> Self:
        """The cache with a `PartitionSpec` in place of each array, as `jax.shard_map` and `jax.jit` take them.

        Args:
            sharding: by which axes; the cache's own if None. Tokens are split along `context` alone where the cache was
                made so, since they are dealt round.

        Raises:
            ValueError: neither is there; `context` where the cache was not made with it.
        """
        chosen = sharding or self.sharding
        if chosen is None:
            raise ValueError("sharding=None: the cache was made without one; wanted a CacheSharding")
        if chosen.context is not None and (self.sharding is None or self.sharding.context != chosen.context):
            raise ValueError(f"context={chosen.context!r}: the cache was not made with it; wanted init(sharding=)")
        stacked = (None,) * (len(self.lengths.shape) - 1)

        def spec(*names: str | None) -> Any:
            return PartitionSpec(*stacked, *chosen.spec(*names))

        return self._specs(spec)

    @property
    def batch(self) -> int:
        """Sequences; of stacked caches, those of each."""
        return self.lengths.shape[-1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        array, axis = self._heads
        return array.shape[axis] // self._repeats

    @property
    def dealt(self) -> Dealt:
        """How tokens are dealt to the devices of a context axis, and which are this one's."""
        raise NotImplementedError

    @property
    def _heads(self) -> tuple[jax.Array, int]:
        """An array, and which of its axes is the KV heads', counted from the last."""
        raise NotImplementedError

    @property
    def _repeats(self) -> int:
        """How many times arrays hold each KV head: on one device's part, once."""
        return 1 if self.sharding is None or self.sharding.is_local else self.sharding.repeats

    def _specs(self, spec: "Spec") -> Self:
        """The cache with a spec in place of each array."""
        raise NotImplementedError

    def _part(self) -> Self:
        """A device's part of the cache, whose static fields are still those of the whole, as a cache of its own."""
        return self

    def _whole(self) -> Self:
        """The same cache without a sharding, as one device has it: each KV head once, tokens in their order."""
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


def _for_cache(
    sharding: CacheSharding | Mesh, config: CompressionConfig, batch: int, num_kv_heads: int
) -> CacheSharding:
    """How to spread a cache; ValueError for sizes that cannot be split, and rules that a part alone cannot follow."""
    chosen = sharding if isinstance(sharding, CacheSharding) else CacheSharding.of(sharding)
    chosen = chosen.for_heads(num_kv_heads)
    check_batch(chosen, batch)
    check_rules(chosen, config)
    return chosen


def check_batch(sharding: CacheSharding, batch: int) -> None:
    """Raise ValueError where a batch cannot be split."""
    if batch % sharding.size("batch"):
        devices = f"mesh axis {sharding.batch!r} has {sharding.size('batch')} devices"
        raise ValueError(f"{devices}; {batch=} must be a multiple of that")


def check_rules(sharding: CacheSharding, config: CompressionConfig) -> None:
    """Raise ValueError for rules that look at what other devices hold."""
    methods = f"k_method={config.k_method!r}, v_method={config.v_method!r}"
    if sharding.size("context") > 1 and not config.by_group:
        raise ValueError(
            f"mesh axis {sharding.context!r} splits the tokens, and {methods} look at more than a group of 32: they "
            f"score with queries over the whole cache, or keep whole channels"
        )
    if sharding.repeats > 1 and config.needs_queries:
        raise ValueError(
            f"mesh axis {sharding.kv_heads!r} has more devices than there are KV heads, and {methods} score with the "
            f"queries of all heads that share one"
        )


def made_in_parts(make: Callable[[], C], sharding: CacheSharding) -> C:
    """The cache that a function makes, each part of it by the device that holds it."""
    shapes = jax.eval_shape(make)
    places = jax.tree.map(lambda _, spec: placed(sharding.mesh, spec), shapes, shapes.partition_specs())
    made: C = jax.jit(make, out_shardings=places)()
    return made


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
