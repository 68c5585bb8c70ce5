"""The KV cache of one attention layer: dense, or a packed part between sinks and a ring of recent tokens."""

from mustafar_jax.cache.base import LayerCache
from mustafar_jax.cache.conventions import check_rope
from mustafar_jax.cache.copies import repeat, truncate
from mustafar_jax.cache.dense import DenseCache
from mustafar_jax.cache.files import load_cache, save
from mustafar_jax.cache.filling import append, prefill
from mustafar_jax.cache.packed import PackedCache, Store

__all__ = [
    "DenseCache",
    "LayerCache",
    "PackedCache",
    "Store",
    "append",
    "check_rope",
    "load_cache",
    "prefill",
    "repeat",
    "save",
    "truncate",
]
