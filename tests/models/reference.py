"""What the models' tests share: random models of transformers, saved and loaded, and runs through a cache."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import lax
from jax.typing import ArrayLike
from transformers import PreTrainedConfig, PreTrainedModel

from mustafar_jax import models
from mustafar_jax.cache import LayerCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.models.llama import Layer

DENSE = CompressionConfig(k_sparsity=0, v_sparsity=0)
TOLERANCE = 1e-4
VOCABULARY = 97
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def random_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of transformers, with weights large enough for every part of it to matter to the logits."""
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.2)
        parameter.data.normal_(mean, spread, generator=generator)
    return model


def saved_and_loaded(model: PreTrainedModel, folder: Path, **options: Any) -> models.Llama:
    model.save_pretrained(folder)
    loaded, tokenizer = models.load(folder, **options)
    assert tokenizer is None
    return loaded


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, shape, dtype=np.int32)


def torch_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Float32 [B, S, vocab_size] of a full forward pass."""
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


@nnx.jit
def forward(model: models.Llama, tokens: ArrayLike, lengths: jax.Array | None = None) -> jax.Array:
    """Float32 [B, S, vocab_size] without a cache."""
    return model(jnp.asarray(tokens), lengths)


def cached_logits(
    model: models.Llama,
    prompts: np.ndarray,
    lengths: np.ndarray,
    continuation: np.ndarray,
    config: CompressionConfig = DENSE,
    capacity: int = 104,
) -> tuple[np.ndarray, np.ndarray, list[LayerCache]]:
    """Prefill right-padded prompts [B, S], then append the continuation's tokens [B, T] one by one.

    Returns the prompt's logits [B, S, V], the continuation's [B, T, V], and the caches.
    """
    caches = list(model.init_cache(config, batch=len(prompts), capacity=capacity))
    counts = jnp.asarray(lengths, jnp.int32)
    hidden = _embed(model, prompts)
    for index, layer in enumerate(model.layers):
        hidden, caches[index] = _prefill(layer, hidden, caches[index], counts)
    prompt = _logits(model, hidden)
    # Layer by layer rather than token by token: the layers are of one structure, so this compiles one of them once.
    hidden = _embed(model, continuation)
    for index, layer in enumerate(model.layers):
        hidden, caches[index] = _decode(layer, hidden, caches[index])
    return np.asarray(prompt), np.asarray(_logits(model, hidden)), caches


@nnx.jit
def _embed(model: models.Llama, tokens: ArrayLike) -> jax.Array:
    return model.embed(jnp.asarray(tokens))


@nnx.jit
def _logits(model: models.Llama, hidden: jax.Array) -> jax.Array:
    return model.logits(hidden)


@nnx.jit
def _prefill(layer: Layer, hidden: jax.Array, cache: LayerCache, lengths: jax.Array) -> tuple[jax.Array, LayerCache]:
    return layer.prefill(hidden, cache, lengths)


@nnx.jit
def _decode(layer: Layer, hidden: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
    """Run tokens [B, T, D] through one layer, one after the other."""

    def step(cache: LayerCache, token: jax.Array) -> tuple[LayerCache, jax.Array]:
        out, cache = layer.decode(token, cache)
        return cache, out

    cache, outs = lax.scan(step, cache, hidden.swapaxes(0, 1))
    return outs.swapaxes(0, 1), cache
