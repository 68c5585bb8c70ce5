"""Pruned, bitmap-packed KV caches for JAX: the cache is physically small, and attention is computed on it as it is."""

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

from mustafar_jax import interop
from mustafar_jax.attention import decode_attention, prefill_attention
from mustafar_jax.blocks import attend
from mustafar_jax.cache import LayerCache, append, check_rope, load_cache, prefill, repeat, save, truncate
from mustafar_jax.config import CompressionConfig
from mustafar_jax.explain import Explanation, explain
from mustafar_jax.generation import Conversation, Generation, chat, generate, log_likelihoods, stream
from mustafar_jax.products import key_spmv, value_spmv
from mustafar_jax.pruning import keep_count, magnitude_mask
from mustafar_jax.rows import Rows, pack, unpack

if TYPE_CHECKING:
    from mustafar_jax import models

__all__ = [
    "CompressionConfig",
    "Conversation",
    "Explanation",
    "Generation",
    "LayerCache",
    "Rows",
    "append",
    "attend",
    "chat",
    "check_rope",
    "decode_attention",
    "explain",
    "generate",
    "interop",
    "keep_count",
    "key_spmv",
    "load_cache",
    "log_likelihoods",
    "magnitude_mask",
    "models",
    "pack",
    "prefill",
    "prefill_attention",
    "repeat",
    "save",
    "stream",
    "truncate",
    "unpack",
    "value_spmv",
]

try:
    __version__ = importlib.metadata.version("mustafar_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


if not TYPE_CHECKING:  # to a type checker, every name would be there

    def __getattr__(name: str) -> Any:
        # The models bring Flax and transformers with them; who only wants the cache need not wait for those.
        if name == "models":
            return importlib.import_module("mustafar_jax.models")
        if name == "BitmapArray":
            warnings.warn("mustafar_jax.BitmapArray is now mustafar_jax.Rows", DeprecationWarning, stacklevel=2)
            return Rows
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        # What a user looks for, the models too before they are loaded; not what this module imports for itself.
        return [*__all__, "__version__"]
