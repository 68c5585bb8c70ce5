"""Qwen2 and Qwen2.5 in Flax NNX: Llama's computation, with biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any, ClassVar

from mustafar_jax.models.config_json import LLAMA_FIELDS
from mustafar_jax.models.fields import FLAG, Field, length, size, token, tokens
from mustafar_jax.models.llama import Llama

# What transformers' Qwen2Config holds. The window is there for all layers from max_window_layers on, where it is used.
QWEN2_FIELDS: Mapping[str, Field] = {
    **{name: field for name, field in LLAMA_FIELDS.items() if name not in ("attention_bias", "mlp_bias")},
    "head_dim": size(None),
    "num_key_value_heads": size(32, nullable=True),
    "max_position_embeddings": length(32768),
    "use_sliding_window": FLAG,
    "sliding_window": size(4096, nullable=True),
    "max_window_layers": token(28),
    "eos_token_id": tokens(None),
}


class Qwen2(Llama):
    """A Qwen2-type language model.

    The projections to queries, keys and values have a bias, and no other has one. Few models use a sliding window; it
    is Mistral's then, and all layers have it.
    """

    architecture = "Qwen2ForCausalLM"
    fields = QWEN2_FIELDS
    always: ClassVar[Mapping[str, Any]] = {"attention_bias": True}
