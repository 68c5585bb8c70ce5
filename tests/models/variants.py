"""Tiny models of transformers, at least one of each kind that the families here hold."""

from typing import Any

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from tests.models.reference import TINY, random_model

# The contexts of the scaled variants are short enough for 100 tokens to pass them, and for head_dim 16 to have
# frequencies that are kept, scaled, and in between.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY_WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}

# transformers' class, and what the config says beside TINY
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama-2": (LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-3": (
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5},
    ),
    "llama-3.1": (LlamaForCausalLM, {"rope_parameters": LLAMA3_SCALING}),
    "llama-3.2": (
        LlamaForCausalLM,
        {"rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "linear-scaling": (
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "smollm2": (
        LlamaForCausalLM,
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "biases-and-head-dim": (
        LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": 1},
    ),
    "mistral-0.1": (
        MistralForCausalLM,
        {"sliding_window": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "mistral-0.2": (
        MistralForCausalLM,
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "mistral-0.3": (MistralForCausalLM, {"sliding_window": None, "head_dim": 32, "num_key_value_heads": 1}),
    "qwen2": (Qwen2ForCausalLM, {"sliding_window": 24}),  # which is not used unless the config says so
    "qwen2.5": (
        Qwen2ForCausalLM,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2-window": (Qwen2ForCausalLM, TINY_WINDOW),
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-window-and-biases": (
        Qwen3ForCausalLM,
        {"head_dim": 24, "num_key_value_heads": 1, "attention_bias": True, **TINY_WINDOW},
    ),
}


def tiny_model(variant: str, **overrides: Any) -> PreTrainedModel:
    """A random model of a variant; its config says the overrides, too."""
    model_class, fields = VARIANTS[variant]
    return random_model(model_class, model_class.config_class(**{**TINY, **fields, **overrides}))
