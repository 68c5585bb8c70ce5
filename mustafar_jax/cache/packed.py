"""The cache whose older tokens are pruned, coded, or both."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from mustafar_jax.backends import registry
from mustafar_jax.backends.registry import Candidates, candidates
from mustafar_jax.cache import statistics
from mustafar_jax.cache.base import COUNTS, META, CacheShape, LayerCache, Spec, made_in_parts
from mustafar_jax.cache.dealing import any_head, any_overflow, dealt_by, norm_of_all, own_tail, undealt
from mustafar_jax.cache.packing import Leaving, packing_of, rule_context
from mustafar_jax.cache.ring import Ring, place_new, place_prompt
from mustafar_jax.config import CompressionConfig
from mustafar_jax.layout import Dealt
from mustafar_jax.operands import Mean, Packing, Tail, restored
from mustafar_jax.pruning import RECENT, query_weight
from mustafar_jax.rows import RowFormat, Rows
from mustafar_jax.writes import write_rows


@functools.partial(jax.tree_util.register_dataclass, data_fields=["dense", "packed"], meta_fields=[])
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Store:
    """The keys or the values of a `PackedCache`.

    Attributes:
        dense: [B, K, sinks + ring, H]; the first tokens of a sequence, then a ring of the most recent ones.
        packed: rows [B, K, C, H], the tokens between them.
    """

    dense: jax.Array
    packed: Rows

    def __repr__(self) -> str:
        """One line: what it is, not what it holds."""
        return f"Store({self.packed}, {self.dense.shape[2]} dense slots)"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "key_mean", "query_norm", "queries", *COUNTS],
    meta_fields=["inv_freq", *META],
)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class PackedCache(LayerCache):
    """Head-major, so that no step transposes it.

    A token's place follows from its position and its sequence's length alone. Of the first `length` tokens:

        positions [0, sinks)                  dense slots [0, sinks)
        positions [sinks, sinks + P)          packed rows [0, P), P = config.packed_tokens(length)
        positions [sinks + P, length)         dense slots sinks + (position - sinks) % ring

    Attributes:
        keys, values: what is held of each.
        key_mean: float32 [B, K, H], the mean key before RoPE; None unless keys are centred. Packed keys are then
            distances from it: a key is what is held plus the mean, rotated to its position. See `statistics` for when
            it is fixed.
        query_norm: float32 [B, K, H], the norm of queries, by which entries of keys are weighed; None unless they are.
            Fixed when the mean is.
        queries: [B, N, 32, H], the most recent queries, each in slot position % 32; None unless a method scores with
            them.
        inv_freq: the RoPE frequencies that rotate `key_mean`; static.
    """

    keys: Store
    values: Store
    key_mean: jax.Array | None
    query_norm: jax.Array | None
    queries: jax.Array | None
    inv_freq: tuple[float, ...] | None

    @property
    def _heads(self) -> tuple[jax.Array, int]:
        """See `LayerCache._heads`."""
        return self.keys.dense, -3

    @property
    def dealt(self) -> Dealt:
        """Which packed rows are this device's: groups are dealt as they are packed."""
        return dealt_by(self.sharding, self.config.group)

    def _specs(self, spec: Spec) -> Self:
        def store(store: Store) -> Store:
            rows = store.packed.specs(spec("batch", "kv_heads", "context"), spec("batch", "kv_heads"))
            return Store(spec("batch", "kv_heads", None, None), rows)

        def if_there(x: Any) -> Any:
            return None if x is None else spec("batch", "kv_heads")

        return dataclasses.replace(
            self,
            keys=store(self.keys),
            values=store(self.values),
            key_mean=if_there(self.key_mean),
            query_norm=if_there(self.query_norm),
            queries=if_there(self.queries),
            lengths=spec("batch"),
            overflow=spec("batch"),
        )

    def _part(self) -> Self:
        if self.dealt.count == 1:
            return self

        def part(store: Store) -> Store:
            rows = dataclasses.replace(store.packed, length=store.packed.length // self.dealt.count)
            return Store(store.dense, rows)

        return dataclasses.replace(self, keys=part(self.keys), values=part(self.values))

    def _whole(self) -> Self:
        if self.sharding is None:
            return self
        count, repeats, rows = self.dealt.count, self._repeats, self.config.packed_tokens(self.capacity)

        def whole(store: Store) -> Store:
            def in_order(x: jax.Array, unit: int) -> jax.Array:
                groups = undealt(x, 2, self.config.group // unit, count)
                return lax.slice_in_dim(groups, 0, rows // unit, axis=2)[:, ::repeats]

            packed = store.packed.map_rows(in_order, rows)
            overflow = None if packed.overflow is None else packed.overflow[:, ::repeats]
            return Store(store.dense[:, ::repeats], dataclasses.replace(packed, overflow=overflow))

        def of_heads(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else x[:, ::repeats]

        return dataclasses.replace(
            self,
            keys=whole(self.keys),
            values=whole(self.values),
            key_mean=of_heads(self.key_mean),
            query_norm=of_heads(self.query_norm),
            sharding=None,
        )

    @property
    def ring(self) -> Ring:
        """Where tokens that are not packed lie."""
        return Ring.of(self.config, self.capacity)

    @property
    def packed_lengths(self) -> jax.Array:
        """int32 [B], packed tokens per sequence."""
        return self.config.packed_tokens(self.lengths)

    def own(self) -> tuple[Tail, jax.Array, jax.Array]:
        """What attention takes beside the rows: the dense tokens, and how many tokens and packed rows [B] there are."""
        tail = Tail(self.keys.dense, self.values.dense, self.ring.sinks)
        if self.dealt.count == 1:
            return tail, self.lengths, self.packed_lengths
        return own_tail(tail, self.lengths, self.packed_lengths, self.dealt)

    @property
    def mean(self) -> Mean | None:
        """What packed keys are distances from; None where they are not centred."""
        if self.key_mean is None:
            return None
        return Mean(self.key_mean, np.asarray(self.inv_freq, np.float32), self.config.sink_tokens, self.dealt)

    @property
    def key_weight(self) -> jax.Array | None:
        """float32 [B, K, H], by which entries of keys are weighed when they are ranked; None unless they are."""
        return None if self.query_norm is None else query_weight(self.query_norm)

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        return *self._whole()._to_dense(self.packed_lengths), self.lengths

    def _to_dense(self, packed_lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values where this many tokens [B] are packed."""
        sinks, slots = self.config.sink_tokens, self.keys.dense.shape[2]
        position = jnp.arange(self.capacity)[None]
        is_packed = (position >= sinks) & (position < sinks + packed_lengths[:, None])
        place = jnp.where(is_packed, slots + position - sinks, self.ring.slot(position))
        held = (position < self.lengths[:, None])[..., None, None]

        def gather(dense: jax.Array, packed: jax.Array) -> jax.Array:
            both = jnp.concatenate([dense.astype(packed.dtype), packed], axis=2).swapaxes(1, 2)
            tokens = jnp.take_along_axis(both, place[..., None, None], axis=1, mode="clip")
            return jnp.where(held, tokens, 0)

        keys = restored(self.keys.packed, turned=self.config.rotate_keys, mean=self.mean)
        values = restored(self.values.packed, turned=self.config.rotate_values)
        return gather(self.keys.dense, keys), gather(self.values.dense, values)

    def packing(self, leaving: Leaving) -> Packing:
        """What a backend is asked to do with tokens that leave the dense part."""

        def all_keys() -> jax.Array:
            """[B, S, K, H]: those that are given, the prompt's, or those that a step found."""
            if leaving.all_keys is not None:
                return leaving.all_keys
            return leaving.key if leaving.head_axis == 2 else self._to_dense(leaving.start)[0]

        context = functools.partial(
            rule_context,
            queries=self.queries,
            lengths=self.lengths,
            num_kv_heads=self.num_kv_heads,
            all_keys=all_keys if self.config.needs_attention else None,
        )
        targets = self.keys.packed, self.values.packed
        return packing_of(leaving, self.config, targets, self.mean, self.key_weight, context)

    def pack_oldest(self, packed: jax.Array, packers: Candidates | None = None) -> Self:
        """Prune and pack the oldest group of each sequence that has one to pack beside its `packed` [B] tokens."""
        start, end = self.dealt.held(packed), self.keys.packed.length
        start = jnp.where(self.dealt.held(self.packed_lengths) > start, start, end)
        return self._pack(self.oldest(packed, start), packers or candidates("pack", None))

    def oldest(self, packed: jax.Array, start: jax.Array) -> Leaving:
        """The oldest groups of the rings, where `packed` [B] tokens are packed, on their way to rows `start` [B]."""
        first = self.ring.slot(self.config.sink_tokens + packed)
        held, rows = jnp.full_like(first, self.config.group), self.config.group
        return Leaving(self.keys.dense, self.values.dense, first, start, held, rows=rows, head_axis=1)

    @staticmethod
    def _holds(config: CompressionConfig) -> bool:
        return not config.is_dense

    @classmethod
    def _empty(
        cls, config: CompressionConfig, shape: CacheShape, inv_freq: ArrayLike | None, num_heads: int | None
    ) -> "PackedCache":
        head_dim, num_kv_heads = shape.head_dim, shape.num_kv_heads
        config.formats(head_dim, shape.dtype)  # refuses a head_dim before any work
        if config.needs_queries and (num_heads is None or num_heads < 1 or num_heads % num_kv_heads):
            methods = f"k_method={config.k_method!r}, v_method={config.v_method!r}"
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}, since {methods} score with queries")
        frequencies = statistics.frequencies(config, inv_freq, head_dim)
        make = functools.partial(_empty, config, shape, frequencies, num_heads if config.needs_queries else None)
        return make() if shape.sharding is None else made_in_parts(make, shape.sharding)

    def _check_queries(self, query: jax.Array | None, leading: tuple[int, ...], *, letters: str) -> None:
        if self.queries is None:
            if self.query_norm is not None and query is not None:
                self._check_weighing(query, leading, letters)
            return
        wanted = (*leading, self.queries.shape[1], self.head_dim)
        if query is None:
            methods = f"k_method={self.config.k_method!r}, v_method={self.config.v_method!r}"
            raise ValueError(f"query=None: {methods} score with queries; wanted {letters} = {list(wanted)}")
        if query.shape != wanted:
            raise ValueError(f"query has shape {query.shape}; the cache wants {letters} = {list(wanted)}")

    def _check_prompt_queries(self, query: jax.Array | None, leading: tuple[int, ...]) -> None:
        self._check_queries(query, leading, letters="[B, S, N, H]")
        if self.query_norm is None:
            return
        if query is None:
            raise ValueError("query=None: weigh_keys=True weighs keys by the prompt's queries; wanted [B, S, N, H]")
        self._check_weighing(query, leading, "[B, S, N, H]")

    def _check_weighing(self, query: jax.Array, leading: tuple[int, ...], letters: str) -> None:
        """Raise ValueError for queries that keys cannot be weighed by."""
        fits = query.ndim == len(leading) + 2 and (*query.shape[:-2], query.shape[-1]) == (*leading, self.head_dim)
        if not fits or query.shape[-2] == 0 or query.shape[-2] % self.num_kv_heads:
            sizes = [*map(str, leading), f"a multiple of {self.num_kv_heads}", str(self.head_dim)]
            raise ValueError(f"query has shape {query.shape}; the cache wants {letters} = [{', '.join(sizes)}]")

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        nothing = jnp.zeros_like(lengths)
        cache = dataclasses.replace(self, lengths=lengths, overflow=jnp.zeros_like(self.overflow))
        positions = self.ring.positions(cache.packed_lengths)
        recent = None
        if self.queries is not None:
            assert query is not None
            recent = statistics.recent_queries(query, lengths, self.dtype)
        cache = dataclasses.replace(
            cache,
            **self._statistics_with(key, query, nothing, lengths),
            queries=recent,
            keys=Store(place_prompt(key, positions, lengths), self.keys.packed.without_overflow()),
            values=Store(place_prompt(value, positions, lengths), self.values.packed.without_overflow()),
        )
        first, rows = jnp.full_like(lengths, self.config.sink_tokens), self.config.packed_tokens(key.shape[1])
        rows, held = self.dealt.share(rows), self.dealt.held(cache.packed_lengths)
        if self.dealt.count > 1:
            own = self.config.sink_tokens + self.dealt.row(jnp.arange(rows))
            key, value = (jnp.take(x, own, axis=1, mode="clip") for x in (key, value))
            first = nothing
        return cache._pack(Leaving(key, value, first, nothing, held, rows, head_axis=2), packers)

    def _truncated(self, lengths: jax.Array) -> Self:
        return _truncated(self, lengths)

    def _extend(
        self, key: jax.Array, value: jax.Array, count: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        fits = jnp.minimum(self.lengths + count, self.capacity)
        positions, queries = self.ring.newest(fits), self.queries
        if queries is not None:
            assert query is not None
            recent = statistics.query_positions(fits)
            queries = place_new(queries, query.astype(self.dtype), recent, self.lengths)
        written = dataclasses.replace(
            self,
            **self._statistics_with(key, query, self.lengths, fits - self.lengths),
            keys=Store(place_new(self.keys.dense, key, positions, self.lengths), self.keys.packed),
            values=Store(place_new(self.values.dense, value, positions, self.lengths), self.values.packed),
            queries=queries,
            lengths=fits,
            overflow=self.overflow | (self.lengths + count > self.capacity),
        )
        return written._pack(self._leaving(key, value, fits), packers)

    def _leaving(self, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Leaving:
        """What leaves the dense part when tokens [B, n, K, H] bring sequences to other lengths [B].

        The oldest of it stands in the ring, where the tokens are not yet; what the ring has no room for is among these.
        """
        packed, end = self.packed_lengths, self.keys.packed.length
        first = self.dealt.held(packed)
        rows = min(self.dealt.share(-(-key.shape[1] // self.config.group) * self.config.group), end)
        position = self.config.sink_tokens + self.dealt.row(first[:, None] + jnp.arange(rows)[None])

        def source(dense: jax.Array, new: jax.Array) -> jax.Array:
            held = jnp.take_along_axis(dense, self.ring.slot(position)[:, None, :, None], axis=2, mode="clip")
            return place_new(held, new, position, self.lengths)

        held = self.dealt.held(self.config.packed_tokens(lengths)) - first
        start = jnp.where(held > 0, first, end)
        sources = source(self.keys.dense, key), source(self.values.dense, value)
        all_keys = None
        if self.config.needs_attention:
            everywhere = jnp.broadcast_to(jnp.arange(self.capacity)[None], (self.batch, self.capacity))
            before = self.to_dense()[0].swapaxes(1, 2)
            all_keys = place_new(before, key.astype(before.dtype), everywhere, self.lengths).swapaxes(1, 2)
        return Leaving(
            *sources, jnp.zeros_like(start), start, held, rows=rows, head_axis=1, bounded=False, all_keys=all_keys
        )

    def _statistics_with(
        self, key: jax.Array, query: jax.Array | None, lengths: jax.Array, count: jax.Array
    ) -> dict[str, Any]:
        """The mean key and the queries' norm with the first `count` [B] of tokens [B, n, ..], from `lengths` [B] on.

        Without queries, the norm stays as it is.
        """
        mean, norm = self.key_mean, self.query_norm
        if mean is not None:
            assert self.inv_freq is not None
            mean = statistics.mean_with(self.config, mean, key, lengths, count, self.inv_freq)
        if norm is not None and query is not None:
            of_all = functools.partial(norm_of_all, sharding=self.sharding)
            norm = statistics.norm_with(self.config, norm, query, lengths, count, of_all)
        return {"key_mean": mean, "query_norm": norm}

    def _append(
        self,
        key: jax.Array,
        value: jax.Array,
        query: jax.Array | None,
        packers: Candidates,
        there: jax.Array | None = None,
    ) -> Self:
        room = self.lengths < self.capacity
        fits = room if there is None else room & there
        slot = jnp.where(fits, self.ring.slot(self.lengths), self.ring.slots)
        stores = (self.keys, key), (self.values, value)
        dense = [write_rows(store.dense, token[:, :, None], slot, axis=2) for store, token in stores]
        asked = None if query is None else query[:, None]
        written = dataclasses.replace(
            self,
            **self._statistics_with(key[:, None], asked, self.lengths, fits.astype(jnp.int32)),
            queries=self._with_query(query, fits),
            keys=Store(dense[0], self.keys.packed),
            values=Store(dense[1], self.values.packed),
            lengths=self.lengths + fits.astype(jnp.int32),
            overflow=self.overflow | (~room if there is None else ~room & there),
        )
        return written.pack_oldest(self.packed_lengths, packers)

    def _with_query(self, query: jax.Array | None, fits: jax.Array) -> jax.Array | None:
        """The most recent queries with this one [B, N, H], of the sequences for whose token there is room."""
        if self.queries is None:
            return None
        assert query is not None
        slot = jnp.where(fits, self.lengths % RECENT, RECENT)
        return write_rows(self.queries, query[:, :, None].astype(self.dtype), slot, axis=2)

    def _pack(self, leaving: Leaving, packers: Candidates) -> Self:
        """Prune and pack tokens."""
        if leaving.rows == 0 or self.config.packed_tokens(self.capacity) == 0:
            return self
        keys, values = _pack_leaving(self, leaving, packers)
        overflow = self.overflow
        keys = dataclasses.replace(keys, overflow=self.keys.packed.overflow)  # their rows are all equal, and fit
        if values.overflow is None or self.config.value_method.equal_rows:
            values = dataclasses.replace(values, overflow=self.values.packed.overflow)
        else:
            values = any_overflow(values, self.sharding)
            assert values.overflow is not None
            overflow = overflow | any_head(values.overflow, self.sharding)
        return dataclasses.replace(
            self,
            overflow=overflow,
            keys=Store(self.keys.dense, keys),
            values=Store(self.values.dense, values),
        )


@functools.partial(jax.jit, static_argnames="packers")  # so that a call outside jit does not compile each time
def _pack_leaving(cache: PackedCache, leaving: Leaving, packers: Candidates) -> tuple[Rows, Rows]:
    """The packed keys and values with the leaving tokens in them."""
    packed: tuple[Rows, Rows] = registry.run("pack", cache.packing(leaving), packers)
    return packed


@jax.jit
def _truncated(cache: PackedCache, lengths: jax.Array) -> PackedCache:
    """See `LayerCache._truncated`. What is packed stays, or goes with all but the sinks."""
    mean, norm, queries = cache.key_mean, cache.query_norm, cache.queries
    unpacked = cache.config.packed_tokens(lengths) == 0
    if mean is not None:
        assert cache.inv_freq is not None
        position = jnp.arange(min(cache.capacity, cache.config.shortest_packed))[None]
        slots = jnp.broadcast_to(cache.ring.slot(position), (cache.batch, position.shape[1]))
        held = jnp.take_along_axis(cache.keys.dense, slots[:, None, :, None], axis=2).swapaxes(1, 2)
        nothing = jnp.zeros_like(lengths)
        anew = statistics.mean_with(cache.config, jnp.zeros_like(mean), held, nothing, lengths, cache.inv_freq)
        mean = jnp.where((unpacked & (lengths < cache.lengths))[:, None, None], anew, mean)
    if norm is not None:
        gone = (lengths == 0) | (unpacked & (cache.packed_lengths > 0))
        norm = jnp.where(gone[:, None, None], 0, norm)
    if queries is not None:
        kept = statistics.query_positions(cache.lengths) < lengths[:, None]
        queries = jnp.where(kept[:, None, :, None], queries, 0)
    return dataclasses.replace(cache, lengths=lengths, key_mean=mean, query_norm=norm, queries=queries)


# One compiled call for a layer: a model has hundreds of these arrays, and calls one by one delay its first token.
@functools.partial(jax.jit, static_argnames=("config", "shape", "inv_freq", "num_queries"))
def _empty(
    config: CompressionConfig, shape: CacheShape, inv_freq: tuple[float, ...] | None, num_queries: int | None
) -> PackedCache:
    leading, head_dim, dtype = (shape.batch, shape.held_heads), shape.head_dim, shape.dtype
    slots, rows = Ring.of(config, shape.capacity).slots, config.packed_tokens(shape.capacity)
    dealt = dealt_by(shape.sharding, config.group)
    rows = dealt.share(rows) * dealt.count

    def store(how: RowFormat) -> Store:
        return Store(jnp.zeros((*leading, slots, head_dim), dtype), how.empty(leading, rows))

    keys, values = (store(how) for how in config.formats(head_dim, dtype))
    return PackedCache(
        keys=keys,
        values=values,
        queries=None if num_queries is None else jnp.zeros((shape.batch, num_queries, RECENT, head_dim), dtype),
        key_mean=None if inv_freq is None else jnp.zeros((*leading, head_dim), jnp.float32),
        query_norm=jnp.zeros((*leading, head_dim), jnp.float32) if config.weigh_keys and config.k_sparsity else None,
        inv_freq=inv_freq,
        config=config,
        **shape.fields(),
    )
