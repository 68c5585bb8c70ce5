"""Odd checkpoints: tiny models of transformers, what is edited in them, and what transformers makes of the result."""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from mustafar_jax import models
from mustafar_jax.models import LazyTensor, ModelConfig
from tests.models.reference import TINY, forward, random_model, random_tokens, torch_logits

TOKENS = random_tokens(1, 24)
SINGLE = "model.safetensors"
ONE_LAYER: dict[str, Any] = {**TINY, "num_hidden_layers": 1}


SMALL = ModelConfig(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    max_position_embeddings=32,
)  # fmt: skip
HF_SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}


def small_arrays() -> dict[str, np.ndarray]:
    """Weights for SMALL by Hugging Face name, all numbers different."""
    layer = {
        "self_attn.q_proj": (16, 8),
        "self_attn.k_proj": (8, 8),
        "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 16),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }
    shapes = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,), "lm_head.weight": (10, 8)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def lazy(arrays: dict[str, np.ndarray]) -> dict[str, LazyTensor]:
    """Arrays as tensors of a checkpoint; each read copies."""
    return {name: LazyTensor(array.shape, functools.partial(np.copy, array)) for name, array in arrays.items()}


def write_small(folder: Path, arrays: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
    """A checkpoint of SMALL."""
    save_arrays(small_arrays() if arrays is None else arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF_SMALL | fields))
    return folder


def _made(kind: str) -> PreTrainedModel:
    match kind:
        case "llama":
            return random_model(LlamaForCausalLM, LlamaConfig(**ONE_LAYER))
        case "tied":
            return random_model(LlamaForCausalLM, LlamaConfig(**ONE_LAYER, tie_word_embeddings=True))
        case "biased":
            return random_model(LlamaForCausalLM, LlamaConfig(**ONE_LAYER, attention_bias=True, mlp_bias=True))
        case "mistral":
            return random_model(MistralForCausalLM, MistralConfig(**ONE_LAYER, sliding_window=9))
        case "qwen2":
            return random_model(Qwen2ForCausalLM, Qwen2Config(**ONE_LAYER, sliding_window=9))
        case "qwen3":
            return random_model(Qwen3ForCausalLM, Qwen3Config(**ONE_LAYER, head_dim=16, sliding_window=9))
    raise ValueError(kind)


@functools.cache
def _saved(kind: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of a small model, made once a process; it goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="odd-")
    with quiet():
        _made(kind).save_pretrained(folder.name)
    return folder


def copy(kind: str, folder: Path, **fields: Any) -> Path:
    """A folder of a small model of a kind, as `_made` makes it, with other fields in config.json."""
    shutil.copytree(_saved(kind).name, folder, dirs_exist_ok=True)
    return edit(folder, **fields)


def edit(folder: Path, **fields: Any) -> Path:
    """Put fields into config.json; a field that is `...` is taken out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder of one file."""
    return load_file(folder / SINGLE)


def write(folder: Path, weights: dict[str, torch.Tensor], name: str = SINGLE) -> Path:
    """Write tensors as a file of the folder."""
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / name)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports and bars."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of loading a folder: logits of `TOKENS` [1, 24, vocab_size], or an error, or random weights."""

    logits: np.ndarray | None = None
    error: str = ""


def theirs(folder: Path) -> Outcome:
    """What transformers makes of a folder; weights that it had to make up are an error."""
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, local_files_only=True
            )
            model, report = loaded
            logits = torch_logits(model.eval(), TOKENS)
    except Exception as error:  # whatever it is: nothing came of it
        return Outcome(error=f"{type(error).__name__}: {error}")
    if made_up := sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])]):
        return Outcome(error=f"made up {made_up}")
    return Outcome(logits)


def ours(folder: Path) -> Outcome:
    """What this library makes of a folder; errors other than those it promises are let through."""
    try:
        model, _ = models.load(folder)
    except (FileNotFoundError, ValueError) as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    return Outcome(np.asarray(forward(model, TOKENS)))
