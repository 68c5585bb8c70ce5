"""Reading config.json: every field that a computation depends on is computed, or refused by name.

What transformers' code reads for these models, and what of it changes nothing here, is tested in
tests/models/test_config_json.py, so that a field which a later transformers reads is noticed.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.fields import FLAG, MISSING, Field, is_at_least_zero, length, size, tokens
from mustafar_jax.models.rope import read_rope, rope_problems
from mustafar_jax.models.window import read_window, window_problem

LLAMA_FIELDS: Mapping[str, Field] = {
    "vocab_size": size(),
    "hidden_size": size(),
    "intermediate_size": size(),
    "num_hidden_layers": size(),
    "num_attention_heads": size(),
    "num_key_value_heads": size(None, nullable=True),
    "head_dim": size(None, nullable=True),
    "max_position_embeddings": length(2048),
    "rms_norm_eps": Field("a number of at least 0", is_at_least_zero, default=1e-6),
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "sliding_window": Field("null: Llama attends to all tokens", lambda value: value is None, default=None),
    "eos_token_id": tokens(2),
}
"""What transformers' LlamaConfig holds, with its defaults; the rotary embedding is read by `rope`."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "attention_chunk_size": (None,),
    "decoder": (None,),
    "fusion_config": (None,),
    "generator": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None,),
    "text_config": (None,),
    "transformers_weights": (None,),
}
"""Fields that transformers reads for every model, and the values of them that are computed here."""


def read_config_json(
    known: Mapping[str, Field], fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model's description that a config.json gives.

    Both spellings are read: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of transformers 5.

    Args:
        known: the fields of the model's family.
        fields: the content of config.json.
        generation: the content of generation_config.json; its stop tokens win over those of config.json.

    Raises:
        ValueError: for what no model here computes, and for numbers out of range, naming every such field, what it
            holds and what is supported.
    """
    # A default of None is what a file gives that leaves the field out; one that says null is checked.
    defaults = {name: field.default for name, field in known.items() if field.default not in (MISSING, None)}
    fields = defaults | dict(fields)
    generation = {name: value for name, value in (generation or {}).items() if value is not None}
    if problems := _problems(known, fields, generation):
        raise ValueError("config.json describes a model that is not supported: " + "; ".join(problems))
    value: dict[str, Any] = {name: fields.get(name) for name in known}
    theta, scaling = read_rope(fields)
    return ModelConfig(
        vocab_size=value["vocab_size"],
        hidden_size=value["hidden_size"],
        intermediate_size=value["intermediate_size"],
        num_layers=value["num_hidden_layers"],
        num_heads=value["num_attention_heads"],
        num_kv_heads=value["num_key_value_heads"] or value["num_attention_heads"],
        head_dim=value["head_dim"] or value["hidden_size"] // value["num_attention_heads"],
        max_position_embeddings=value["max_position_embeddings"],
        rms_norm_eps=value["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=read_window(known, fields),
        tie_word_embeddings=value["tie_word_embeddings"],
        attention_bias=value.get("attention_bias", False),
        attention_output_bias=value.get("attention_bias", False),
        mlp_bias=value.get("mlp_bias", False),
        eos_ids=_tokens(generation.get("eos_token_id", value["eos_token_id"])),
    )


def _problems(known: Mapping[str, Field], fields: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    problems = [field.problem(name, fields) for name, field in known.items()]
    for name, supported in ONLY.items():
        if fields.get(name, supported[0]) not in supported:
            problems.append(f"{name}={reprlib.repr(fields[name])}, supported: {', '.join(map(repr, supported))}")
    if fields.get("quantization_config") is not None:
        problems.append("quantization_config is present, supported: bfloat16, float16 and float32 weights")
    problems += [window_problem(known, fields), *rope_problems(fields), _stops_problem(known, generation)]
    return [problem for problem in problems if problem is not None]


def _stops_problem(known: Mapping[str, Field], generation: Mapping[str, Any]) -> str | None:
    if "eos_token_id" not in generation:
        return None
    problem = known["eos_token_id"].problem("eos_token_id", generation)
    return problem and f"{problem} (in generation_config.json)"


def _tokens(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
