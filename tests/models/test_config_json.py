"""Every field of config.json that changes a model is computed as transformers does, or refused by name."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mustafar_jax import models
from mustafar_jax.models import Llama, RopeScaling
from mustafar_jax.models.checkpoint import MODELS
from mustafar_jax.models.config_json import LLAMA_FIELDS, ONLY
from tests.helpers import exhaustive
from tests.models import odd
from tests.models.reference import TOLERANCE

CLASSES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What transformers reads and this library does not, each with a value that would show, were it of influence.
HARMLESS: dict[str, Any] = {
    "attention_dropout": 0.5,  # of training
    "attn_implementation": "eager",  # how, not what
    "auto_map": {"AutoConfig": "configuration.Config"},  # code of others, which is never run
    "bos_token_id": 5,  # the tokenizer's business
    "chunk_size_feed_forward": 4,
    "gradient_checkpointing": True,
    "id2label": {"0": "a", "1": "b", "2": "c"},  # of classifiers, as the four that follow
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "initializer_range": 0.5,  # of training
    "is_encoder_decoder": True,
    "max_window_layers": 0,  # of Qwen alone, as use_sliding_window
    "mlp_layer_types": ["dense"],  # of families whose feed-forward networks differ
    "mtp_layer_types": ["full_attention"],
    "name_or_path": "elsewhere",
    "output_attentions": False,
    "output_hidden_states": True,
    "pad_token_id": 3,
    "pretraining_tp": 2,
    "return_dict": True,
    "transformers_version": "4.0.0",
    "use_cache": False,
    "use_sliding_window": False,
}
# Of classes, not of files; num_heads is only asked for by configs that lack it.
NO_FIELDS = {
    "base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan", "default_rope_type",
    "default_theta", "ignore_keys_at_rope_validation", "is_heterogeneous", "num_heads", "sub_configs",
    "sub_configs_defaults", "vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy",
}  # fmt: skip
COMPUTED_ELSEWHERE = {
    "architectures", "dtype", "layer_types", "model_type", "original_max_position_embeddings", "partial_rotary_factor",
    "quantization_config", "rope_parameters", "rope_scaling", "rope_theta", "torch_dtype",
}  # fmt: skip

FIELDS: dict[str, list[Any]] = {
    "architectures": [None, [], ["LlamaModel"], ["MistralModel"], ["LlamaForSequenceClassification"]],
    "attention_bias": [True, False, ...],
    "attention_chunk_size": [4],
    "decoder": [{}],
    "dtype": ["float32", None, ..., "float64", "int8"],
    "eos_token_id": [None, 5, [5, 6]],
    "fusion_config": [{"patch_embeddings": True}],
    "generator": [{}],
    "head_dim": [None, ..., 8],
    "hidden_act": ["swish", "gelu", "relu", ...],
    "intermediate_size": [48],
    "is_causal": [False, True],
    "kv_sharing_modes": [["reuse"]],
    "layer_types": [None, ["full_attention"], ["sliding_attention"], ["chunked_attention"], ["sliding_attention"] * 2],
    "logit_scale": [3.0],
    "logits_scaling": [8.0],
    "max_position_embeddings": [64, 8, ...],
    "max_window_layers": [0, 1, 28],
    "mlp_bias": [True, False, ...],
    "model_type": ["qwen2_moe", "granite", "gpt2"],
    "num_hidden_layers": [2],
    "num_key_value_heads": [4, ...],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [0.5, 1.0],
    "per_layer_config": [{"0": {"head_dim": 8}}, {"0": {"sliding_window": 4}}],
    "quantization_config": [{"quant_method": "fp8"}, None],
    "rms_norm_eps": [1e-2, ...],
    "rope_parameters": [
        None,
        ...,
        {},
        {"rope_theta": 500.0},
        {"type": "linear", "factor": 2, "rope_theta": 500.0},
        {**LINEAR, "attention_factor": 3.0, "mscale": 2.0},
        {**LINEAR, "partial_rotary_factor": 0.5},
        {**LLAMA3, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 2.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 3.0}},
    ],
    "rope_scaling": [
        None,
        {},
        {"type": "linear", "factor": 2},
        {"type": "linear", "rope_type": "default", "factor": 2.0},
        {**LINEAR, "rope_theta": 500.0},
        LLAMA3,
        {**LLAMA3, "original_max_position_embeddings": 16},
        {**LLAMA3, "low_freq_factor": -1.0},
        {"type": "dynamic", "factor": 2.0},
        {"type": "yarn", "factor": 2.0, "attention_factor": 2.0},
        {"rope_type": "longrope", "short_factor": [2.0] * 8, "long_factor": [2.0] * 8},
    ],
    "rope_theta": [500.0, 7],
    "sliding_window": [None, 5, 100, ...],
    "text_config": [{"vocab_size": 3}],
    "tie_word_embeddings": [True, False, ...],
    "torch_dtype": ["float32"],
    "transformers_weights": ["other.safetensors"],
    "use_sliding_window": [True, False, ...],
    "vocab_size": [96],
}
# Values of fields that act together: each of one with each of the other, beside what the last one says.
Together = list[tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, Any]]]
FULL, SLIDING = "full_attention", "sliding_attention"
QWEN_TOGETHER: Together = [
    (
        {"sliding_window": [5, 100, None, ...]},
        {"max_window_layers": [0, 1, 28, ...]},
        {"use_sliding_window": True, "layer_types": ...},
    ),
    (
        {"sliding_window": [5, None]},
        {"layer_types": [[FULL], [SLIDING], [SLIDING] * 2, [], None]},
        {"use_sliding_window": True, "max_window_layers": 28},
    ),
    (
        {"use_sliding_window": [False, ...]},
        {"layer_types": [[FULL], [SLIDING], ...]},
        {"sliding_window": 5, "max_window_layers": 0},
    ),
]
TOGETHER: dict[str, Together] = {
    "llama": [
        (
            {"rope_scaling": FIELDS["rope_scaling"]},
            {"rope_theta": [500.0], "original_max_position_embeddings": [..., 16]},
            {"rope_parameters": ...},
        ),
        (
            {"rope_parameters": [{**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 9.0}, LLAMA3]},
            {
                "rope_theta": [500.0],
                "rope_scaling": [{}, LINEAR, LLAMA3],
                "original_max_position_embeddings": [64],
                "max_position_embeddings": [64, ...],
                "partial_rotary_factor": [0.5, 1.0],
            },
            {},
        ),
    ],
    "mistral": [
        (
            {"sliding_window": [5, 100, ...]},
            {"layer_types": [["full_attention"], ["sliding_attention"]], "use_sliding_window": [False]},
            {},
        ),
        ({"layer_types": [["sliding_attention"], []]}, {"sliding_window": [None]}, {}),
    ],
    **dict.fromkeys(("qwen2", "qwen3"), QWEN_TOGETHER),
}


def alone(family: str) -> list[dict[str, Any]]:
    return [{}, harmless(family), *({name: value} for name, values in FIELDS.items() for value in values)]


def alone_and_together(family: str) -> list[dict[str, Any]]:
    found = alone(family)
    for first, second, beside in TOGETHER[family]:
        for (one, ones), (two, twos) in itertools.product(first.items(), second.items()):
            found += [{one: a, two: b, **beside} for a, b in itertools.product(ones, twos)]
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("cases", "family"), [(alone, "llama"), *exhaustive(*((alone_and_together, family) for family in MODELS))]
)
def test_logits_are_those_of_transformers_or_a_field_is_named(cases, family, tmp_path):
    odd.copy(family, tmp_path)
    original = (tmp_path / "config.json").read_text()
    loaded = 0
    for fields in cases(family):
        (tmp_path / "config.json").write_text(original)
        odd.edit(tmp_path, **fields)
        got = odd.ours(tmp_path)
        if got.logits is None:
            assert any(name in got.error for name in named_by(fields)), (fields, got.error)
            continue
        wanted = odd.theirs(tmp_path)
        assert wanted.logits is not None, (fields, wanted.error)
        np.testing.assert_allclose(got.logits, wanted.logits, atol=TOLERANCE, rtol=0, err_msg=str(fields))
        loaded += 1
    assert loaded > 30


def harmless(family: str) -> dict[str, Any]:
    return {name: value for name, value in HARMLESS.items() if name not in MODELS[family].fields}


def named_by(fields: dict[str, Any]) -> list[str]:
    """What an error may call that has to do with these fields: sizes may show in the tensors alone."""
    inner = [key for value in fields.values() if isinstance(value, dict) for key in value]
    sizes = [name for name in fields if name in LLAMA_FIELDS]
    return [*fields, *inner, "rope_type", *(["do not fit the model", "num_kv_heads"] if sizes else [])]


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in MODELS for name in harmless(family)])
def test_harmless_fields_change_no_description(family, name):
    fields = dict(MINIMAL)
    assert MODELS[family].read_config(fields | {name: HARMLESS[name]}) == MODELS[family].read_config(fields)


@pytest.mark.parametrize("family", MODELS)
def test_every_field_that_transformers_reads_is_known(family, tmp_path, monkeypatch):
    """A field that a later transformers reads is to be computed, refused or found harmless: then it goes in a table."""
    odd.copy(family, tmp_path)
    read: set[str] = set()
    usual = PreTrainedConfig.__getattribute__

    def noted(self: PreTrainedConfig, name: str) -> Any:
        read.add(name)
        return usual(self, name)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", noted)
    with odd.quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, pad_token_id=0)
    monkeypatch.undo()

    config = CLASSES[family]
    read = {name for name in read if not name.startswith("_") and not callable(getattr(config, name, None))}
    assert {"is_causal", "sliding_window", "rope_parameters"} <= read  # the test sees what is read
    generation = set(GenerationConfig()._get_default_generation_params())  # of sampling, which has its own arguments
    known = {*MODELS[family].fields, *ONLY, *HARMLESS, *NO_FIELDS, *COMPUTED_ELSEWHERE, *generation}
    assert {*read, *(field.name for field in dataclasses.fields(config))} - known == set()


# Numbers out of range

MINIMAL = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
NO_LENGTH = [True, False, "8", 8.5, 8.0, -1, 0, 2**63, 10**30, [8], {}, float("nan")]
NO_SIZE = [*NO_LENGTH, 2**31]
NO_NUMBER = [True, "1.0", -1.0, float("inf"), float("nan"), 10**400, [1.0], {}]
NO_FLAG = [0, 1, "false", None, []]
NO_TOKEN = [2.0, -1, True, "2", None, 2**31, [1], {}]
NO_TOKENS = [2.0, -1, True, "2", [2, -1], [2.5], [None], 2**31, {}]
BAD: dict[str, list[Any]] = {
    **dict.fromkeys(["num_key_value_heads", "head_dim"], NO_SIZE),
    **{name: [*NO_SIZE, None] for name in MINIMAL},
    "max_position_embeddings": [*NO_LENGTH, None],
    **dict.fromkeys(["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"], NO_FLAG),
    "rms_norm_eps": [*NO_NUMBER, None],
    "eos_token_id": NO_TOKENS,
    "sliding_window": NO_SIZE,
    "max_window_layers": NO_TOKEN,
}


def test_every_field_has_its_bad_values():
    assert set(BAD) == {name for model_class in MODELS.values() for name in model_class.fields}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in MODELS for name in MODELS[family].fields])
def test_numbers_out_of_range_are_named(family, name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"config\.json .*: {name}=.* must be ") as caught:
            MODELS[family].read_config(MINIMAL | {name: value})
        assert repr(value)[:8] in str(caught.value)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "name", ["rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
)
def test_rope_numbers_out_of_range_are_named(name, spelling):
    rope = {**LLAMA3, "original_max_position_embeddings": 16}
    for value in NO_LENGTH if name.startswith("original") else [*NO_NUMBER, 0, None]:
        with pytest.raises(ValueError, match=rf"{name}=.* must be a (number above 0|positive integer)"):
            Llama.read_config(MINIMAL | {spelling: rope | {name: value}})


@pytest.mark.parametrize("value", [False, [], "linear", 3])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_rope_that_is_no_object(spelling, value):
    with pytest.raises(ValueError, match=rf"{spelling}=.* must be an object"):
        Llama.read_config(MINIMAL | {spelling: value})


def test_stop_tokens_of_generation_config_are_checked():
    for value in NO_TOKENS:
        with pytest.raises(ValueError, match=r"eos_token_id=.* must be .*\(in generation_config\.json\)"):
            Llama.read_config(MINIMAL, {"eos_token_id": value})


@pytest.mark.parametrize("family", MODELS)
def test_defaults_are_those_of_transformers(family):
    config, wanted = MODELS[family].read_config(MINIMAL), CLASSES[family](**MINIMAL)
    assert config.num_kv_heads == wanted.num_key_value_heads
    assert config.head_dim == getattr(wanted, "head_dim", wanted.hidden_size // wanted.num_attention_heads)
    assert config.max_position_embeddings == wanted.max_position_embeddings
    assert config.rms_norm_eps == wanted.rms_norm_eps
    assert config.rope_theta == wanted.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == wanted.tie_word_embeddings
    assert config.sliding_window == getattr(wanted, "sliding_window", None)
    assert config.eos_ids == (() if wanted.eos_token_id is None else (wanted.eos_token_id,))
    assert config.attention_bias == (family == "qwen2")  # its biases are no field of its config


def test_a_required_field_that_is_missing_is_named_beside_what_is_wrong():
    fields = {name: value for name, value in MINIMAL.items() if name != "vocab_size"} | {"hidden_act": "relu"}
    with pytest.raises(ValueError, match="vocab_size is missing; hidden_act='relu', supported: 'silu'"):
        Llama.read_config(fields)


# What is refused


def test_a_config_s_fields_are_read():
    scaling = {"type": "linear", "factor": 2}
    fields = odd.HF_SMALL | {"rope_theta": 7, "rope_scaling": scaling, "attention_bias": True}
    config = Llama.read_config(fields)
    assert config.rope_theta == 7
    assert config.rope_scaling == RopeScaling("linear", 2.0)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 4)
    assert (config.attention_bias, config.mlp_bias, config.sliding_window) == (True, False, None)


# As published: the older spelling, without layer_types, and with windows that are not used.
QWEN25_7B = {
    "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 131072, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_mrope": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "max_window_layers": 36, "use_sliding_window": False, "sliding_window": None,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": False,
    "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (QWEN25_7B, {"num_heads": 28, "num_kv_heads": 4, "head_dim": 128, "attention_bias": True, "qk_norm": False}),
        (QWEN3_8B, {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "attention_bias": False, "qk_norm": True}),
    ],
    ids=["Qwen2.5-7B", "Qwen3-8B"],
)
def test_files_as_published(fields, wanted):
    config = MODELS[fields["model_type"]].read_config(fields)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.sliding_window, config.rope_theta, config.rope_scaling) == (None, 1e6, None)
    assert not config.attention_output_bias
    generation = {"eos_token_id": [151645, 151643]}
    assert MODELS[fields["model_type"]].read_config(fields, generation).eos_ids == (151645, 151643)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', supported: 'silu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic', supported: 'default', 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn', supported: 'default'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing beside rope_type='linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, supported: 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5, supported: 1.0"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types=.*supported: the same for all"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is present"),
        ({"vocab_size": None}, "vocab_size=None must be a positive integer"),
        ({"hidden_act": "relu", "vocab_size": None}, "vocab_size=None must be a .* integer .*; hidden_act='relu'"),
        ({"model_type": "gpt2"}, "model_type='gpt2' in config.json, supported: 'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"model_type": None}, "model_type=None in config.json"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures=\['LlamaForSequenceClassification'\]"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"hidden_size": "8"}, "hidden_size='8' must be a positive integer"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 must be a positive integer"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0 must be a number above 0"),
        ({"sliding_window": 9}, "sliding_window=9 must be null: Llama"),
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' in config.json, supported: 'llama', "),
        ({"num_hidden_layers": 2**31 - 1}, "num_layers=2147483647 is more than the checkpoint's 21 tensors hold"),
    ],
)
def test_what_is_not_supported_is_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.load(odd.write_small(tmp_path, **fields))
