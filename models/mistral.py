"""Mistral in Flax NNX: Llama's computation, with the sliding window that v0.1 has and v0.2 and v0.3 do not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.llama import Llama


class Mistral(Llama):
    """A Mistral-type language model.

    A token at position p attends to the positions s with p - s < `config.sliding_window`, itself included; None lets
    it attend to all before it. No projection has a bias.
    """

    architecture = "MistralForCausalLM"

    @classmethod
    def read_config(cls, fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """The description that config.json (and generation_config.json) gives; ValueError for what is unsupported."""
        # What a file leaves out has the value that transformers' MistralConfig gives it: a window of 4096 as in v0.1.
        # Later versions say null.
        defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
        fields = {**defaults, **fields, "attention_bias": False, "mlp_bias": False}
        config = super().read_config(fields, generation)
        return dataclasses.replace(config, sliding_window=fields["sliding_window"])
