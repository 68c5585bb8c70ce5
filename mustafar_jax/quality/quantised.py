"""Quantised caches, by simulation: an honest neighbour of pruned ones in the same tables.

What leaves the dense window is rounded to a few bits in groups of 32: keys per channel, along 32 tokens, values per
token, along 32 channels (as KIVI does, arXiv 2402.02750). Held are the rounded numbers as ordinary ones; `nbytes`
counts what the bits, scales and offsets would take.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mustafar_jax.cache import PackedCache, Rows, Store
from mustafar_jax.config import CompressionConfig
from mustafar_jax.pruning import Context

GROUP = 32
"""Numbers that share a scale and an offset, of 16 bits each."""


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kind of cache: `bits` per number, and `config`'s dense window and sinks."""

    bits: int
    config: CompressionConfig = dataclasses.field(default_factory=CompressionConfig)

    def init_cache(self, model: Any, *, batch: int, capacity: int, dtype: DTypeLike | None = None) -> "QuantisedCache":
        """One layer's empty cache, of the model's dtype if None."""
        pruned = model.init_cache(self.config, batch=batch, capacity=capacity, dtype=dtype)[0]
        assert isinstance(pruned, PackedCache)
        fields = {field.name: getattr(pruned, field.name) for field in dataclasses.fields(pruned)}
        stores = {name: Store(fields[name].dense, _zeros(fields[name].packed)) for name in ("keys", "values")}
        config = dataclasses.replace(self.config, k_sparsity=0, v_sparsity=0)
        return QuantisedCache(**(fields | stores | {"config": config}), bits=self.bits)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "key_mean", "key_weight", "queries", "lengths", "overflow"],
    meta_fields=["inv_freq", "config", "capacity", "num_kv_heads", "head_dim", "dtype", "bits"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedCache(PackedCache):
    """A cache whose older tokens are rounded."""

    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes that the cache would hold with `bits` per number, and 32 for each group's scale and offset."""
        rounded = sum(math.prod(store.packed.shape) for store in (self.keys, self.values))
        as_they_are = rounded * self.dtype.itemsize
        return super().nbytes - as_they_are + rounded * self.bits // 8 + rounded // GROUP * 4

    def _compress(self, key: jax.Array, value: jax.Array, positions: jax.Array, context: Context) -> tuple[Rows, Rows]:
        return quantise(key.swapaxes(2, 3), self.bits).swapaxes(2, 3), quantise(value, self.bits)


def quantise(x: jax.Array, bits: int) -> jax.Array:
    """Round [..., n] to 2**bits levels between the least and the largest of each 32 numbers; n a multiple of 32."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    least, largest = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    least, scale = (y.astype(jnp.float16).astype(jnp.float32) for y in (least, (largest - least) / (2**bits - 1)))
    level = jnp.clip(jnp.round((groups - least) / jnp.where(scale > 0, scale, 1)), 0, 2**bits - 1)
    return (least + level * scale).reshape(x.shape).astype(x.dtype)


def _zeros(packed: Rows) -> jax.Array:
    return jnp.zeros(packed.shape, packed.dtype)
