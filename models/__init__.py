"""Flax NNX models and the checkpoints that fill them."""

from mustafar_jax.models.checkpoint import LazyTensor, load, load_weights
from mustafar_jax.models.config import ModelConfig, RopeScaling
from mustafar_jax.models.llama import Llama
from mustafar_jax.models.mistral import Mistral

__all__ = ["LazyTensor", "Llama", "Mistral", "ModelConfig", "RopeScaling", "load", "load_weights"]
