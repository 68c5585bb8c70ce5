"""The cache that neither prunes nor codes: the baseline of every comparison."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mustafar_jax.backends.registry import Candidates
from mustafar_jax.cache.base import COUNTS, STATIC, CacheShape, LayerCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.writes import write_rows


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "value", *COUNTS], meta_fields=STATIC)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class DenseCache(LayerCache):
    """Key and value [B, capacity, K, H], in the layout that cuDNN reads without a copy."""

    key: jax.Array
    value: jax.Array

    @property
    def num_kv_heads(self) -> int:
        """See `LayerCache.num_kv_heads`."""
        return self.key.shape[-2]

    def to_dense(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `LayerCache.to_dense`."""
        held = (jnp.arange(self.capacity)[None] < self.lengths[:, None])[..., None, None]
        return jnp.where(held, self.key, 0), jnp.where(held, self.value, 0), self.lengths

    @staticmethod
    def _holds(config: CompressionConfig) -> bool:
        return config.is_dense

    @classmethod
    def _empty(
        cls, config: CompressionConfig, shape: CacheShape, inv_freq: ArrayLike | None, num_heads: int | None
    ) -> "DenseCache":
        return _empty(config, shape)

    def _prefill(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array, query: jax.Array | None, packers: Candidates
    ) -> Self:
        held = (jnp.arange(key.shape[1])[None] < lengths[:, None])[..., None, None]
        return dataclasses.replace(
            self,
            key=self.key.at[:, : key.shape[1]].set(jnp.where(held, key, 0)),
            value=self.value.at[:, : key.shape[1]].set(jnp.where(held, value, 0)),
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
        start = self.lengths if there is None else jnp.where(there, self.lengths, self.capacity)
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
        write = functools.partial(write_rows, start=self.lengths, count=lengths - self.lengths, axis=1)
        return dataclasses.replace(
            self,
            key=write(self.key, key),
            value=write(self.value, value),
            lengths=lengths,
            overflow=self.overflow | (self.lengths + count > self.capacity),
        )


# One compiled call for a layer: a model has hundreds of these arrays, and calls one by one delay its first token.
@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _empty(config: CompressionConfig, shape: CacheShape) -> DenseCache:
    size = (shape.batch, shape.capacity, shape.num_kv_heads, shape.head_dim)
    key, value = (jnp.zeros(size, shape.dtype) for _ in range(2))
    return DenseCache(key=key, value=value, config=config, **shape.fields())
