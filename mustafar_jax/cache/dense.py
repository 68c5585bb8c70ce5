"""The cache that neither prunes nor codes: the baseline of every comparison."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Candidates
from mustafar_jax.cache.base import COUNTS, META, CacheShape, LayerCache, Spec, made_in_parts
from mustafar_jax.cache.dealing import dealt_by, undealt
from mustafar_jax.config import CompressionConfig
from mustafar_jax.layout import WORD, Dealt
from mustafar_jax.writes import write_rows


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "value", *COUNTS], meta_fields=META)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class DenseCache(LayerCache):
    """Key and value [B, capacity, K, H], in the layout that cuDNN reads without a copy."""

    key: jax.Array
    value: jax.Array

    @property
    def _heads(self) -> tuple[jax.Array, int]:
        """See `LayerCache._heads`."""
        return self.key, -2

    @property
    def dealt(self) -> Dealt:
        """Which tokens are this device's."""
        return dealt_by(self.sharding, WORD)

    def _specs(self, spec: Spec) -> Self:
        of_tokens, of_sequences = spec("batch", "context", "kv_heads", None), spec("batch")
        return dataclasses.replace(self, key=of_tokens, value=of_tokens, lengths=of_sequences, overflow=of_sequences)

    def _whole(self) -> Self:
        if self.sharding is None:
            return self
        count, repeats = self.sharding.size("context"), self._repeats

        def whole(x: jax.Array) -> jax.Array:
            return undealt(x, 1, WORD, count)[:, : self.capacity, ::repeats]

        return dataclasses.replace(self, key=whole(self.key), value=whole(self.value), sharding=None)

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        whole = self._whole()
        held = (jnp.arange(self.capacity)[None] < self.lengths[:, None])[..., None, None]
        return jnp.where(held, whole.key, 0), jnp.where(held, whole.value, 0), self.lengths

    @staticmethod
    def _holds(config: CompressionConfig) -> bool:
        return config.is_dense

    @classmethod
    def _empty(
        cls, config: CompressionConfig, shape: CacheShape, inv_freq: ArrayLike | None, num_heads: int | None
    ) -> "DenseCache":
        make = functools.partial(_empty, config, shape)
        return make() if shape.sharding is None else made_in_parts(make, shape.sharding)

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        position = self.dealt.row(jnp.arange(self.dealt.share(key.shape[1])))
        held = (position[None] < lengths[:, None])[..., None, None]

        def placed(tokens: jax.Array, new: jax.Array) -> jax.Array:
            if self.dealt.count > 1:
                new = jnp.take(new, position, axis=1, mode="clip")
            return tokens.at[:, : len(position)].set(jnp.where(held, new, 0))

        return dataclasses.replace(
            self,
            key=placed(self.key, key),
            value=placed(self.value, value),
            lengths=lengths,
            overflow=jnp.zeros_like(self.overflow),
        )

    def _append(
        self,
        key: jax.Array,
        value: jax.Array,
        query: jax.Array | None,
        packers: Candidates,
        there: jax.Array | None = None,
    ) -> Self:
        one = jnp.ones_like(self.lengths) if there is None else there.astype(jnp.int32)
        start, end = self.dealt.held(self.lengths), self.key.shape[1]
        if self.dealt.count > 1:  # the token is another device's
            start = jnp.where(self.dealt.held(self.lengths + 1) > start, start, end)
        start = start if there is None else jnp.where(there, start, end)
        return dataclasses.replace(  # a sequence at its capacity has no row to write
            self,
            key=write_rows(self.key, key[:, None], start, axis=1),
            value=write_rows(self.value, value[:, None], start, axis=1),
            lengths=jnp.minimum(self.lengths + one, self.capacity),
            overflow=self.overflow | (self.lengths + one > self.capacity),
        )

    def _truncated(self, lengths: jax.Array) -> Self:
        return dataclasses.replace(self, lengths=lengths)

    def _extend(
        self, key: jax.Array, value: jax.Array, count: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        lengths = jnp.minimum(self.lengths + count, self.capacity)
        start = self.dealt.held(self.lengths)
        if self.dealt.count > 1:
            key, value = (self._own(x, start) for x in (key, value))
        write = functools.partial(write_rows, start=start, count=self.dealt.held(lengths) - start, axis=1)
        return dataclasses.replace(
            self,
            key=write(self.key, key),
            value=write(self.value, value),
            lengths=lengths,
            overflow=self.overflow | (self.lengths + count > self.capacity),
        )

    def _own(self, tokens: jax.Array, start: jax.Array) -> jax.Array:
        """Of new tokens [B, n, K, H] those that this device holds, from its place `start` [B] on."""
        most = min(tokens.shape[1], self.dealt.share(tokens.shape[1]) + self.dealt.unit)
        position = self.dealt.row(start[:, None] + jnp.arange(most)[None]) - self.lengths[:, None]
        return jnp.take_along_axis(tokens, position[:, :, None, None], axis=1, mode="clip")


# One compiled call for a layer: a model has hundreds of these arrays, and calls one by one delay its first token.
@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _empty(config: CompressionConfig, shape: CacheShape) -> DenseCache:
    tokens = dealt_by(shape.sharding, WORD).share(shape.capacity) * (
        shape.sharding.size("context") if shape.sharding else 1
    )
    size = (shape.batch, tokens, shape.held_heads, shape.head_dim)
    key, value = (jnp.zeros(size, shape.dtype) for _ in range(2))
    return DenseCache(key=key, value=value, config=config, **shape.fields())
