"""Flax NNX models and the checkpoints that fill them."""

import os

# transformers is here for tokenizers and chat templates alone; it would advise whoever lacks PyTorch to install it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from mustafar_jax.models.checkpoint import (
    Checkpoint,
    check_mesh,
    load,
    load_config,
    load_weights,
    open_checkpoint,
    spread,
)
from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.llama import Llama
from mustafar_jax.models.mistral import Mistral
from mustafar_jax.models.qwen2 import Qwen2
from mustafar_jax.models.qwen3 import Qwen3
from mustafar_jax.models.rope import RopeScaling
from mustafar_jax.models.tensors import LazyTensor

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "Llama",
    "Mistral",
    "ModelConfig",
    "Qwen2",
    "Qwen3",
    "RopeScaling",
    "check_mesh",
    "load",
    "load_config",
    "load_weights",
    "open_checkpoint",
    "spread",
]
