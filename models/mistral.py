"""Mistral in Flax NNX: Llama's computation, with the sliding window that v0.1 has and v0.2 and v0.3 do not."""

from collections.abc import Mapping

from mustafar_jax.models.config_json import LLAMA_FIELDS
from mustafar_jax.models.fields import Field, length, size
from mustafar_jax.models.llama import Llama

# What transformers' MistralConfig holds. Where a file leaves the window out it is v0.1's; later versions say null.
MISTRAL_FIELDS: Mapping[str, Field] = {
    **{name: field for name, field in LLAMA_FIELDS.items() if name not in ("attention_bias", "mlp_bias")},
    "num_key_value_heads": size(8, nullable=True),
    "max_position_embeddings": length(131072),
    "sliding_window": size(4096, nullable=True),
}


class Mistral(Llama):
    """A Mistral-type language model.

    A token at position p attends to the positions s with p - s < `config.sliding_window`, itself included; None lets
    it attend to all before it. No projection has a bias.
    """

    architecture = "MistralForCausalLM"
    fields = MISTRAL_FIELDS
