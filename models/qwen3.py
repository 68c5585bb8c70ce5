"""Qwen3 in Flax NNX: Llama's computation, with an RMSNorm of each head's query and key before they are rotated."""

from collections.abc import Mapping
from typing import Any, ClassVar

from mustafar_jax.models.fields import FLAG, Field, size
from mustafar_jax.models.llama import Llama
from mustafar_jax.models.qwen2 import QWEN2_FIELDS

# What transformers' Qwen3Config holds.
QWEN3_FIELDS: Mapping[str, Field] = {**QWEN2_FIELDS, "head_dim": size(128), "attention_bias": FLAG}


class Qwen3(Llama):
    """A Qwen3-type language model.

    The two norms are over the `config.head_dim` channels of a head, each with one weight for all heads. Projections
    have biases where `attention_bias` says so. A sliding window is as in `Qwen2`.
    """

    architecture = "Qwen3ForCausalLM"
    fields = QWEN3_FIELDS
    always: ClassVar[Mapping[str, Any]] = {"qk_norm": True}
