"""Folders as people have them: what transformers loads is loaded alike, and the rest is refused with its reason."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mustafar_jax import models
from mustafar_jax.models.tensors import with_usual_names
from tests.models import odd
from tests.models.reference import TINY, TOLERANCE, forward

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Build = Callable[[Path], object]


def renamed(change: Callable[[str], str]) -> Build:
    return lambda folder: odd.write(folder, {change(name): tensor for name, tensor in odd.tensors(folder).items()})


def with_tensors(**tensors: torch.Tensor) -> Build:
    """More tensors, or others; `__` in a name stands for a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda folder: odd.write(folder, odd.tensors(folder) | more)


def without(part: str) -> Build:
    """All tensors but those whose name holds the part."""
    return lambda folder: odd.write(folder, {n: tensor for n, tensor in odd.tensors(folder).items() if part not in n})


def cast(dtype: torch.dtype, *parts: str) -> Build:
    """Tensors whose name holds one of the parts, or all, in another dtype."""

    def build(folder: Path) -> None:
        chosen = odd.tensors(folder).items()
        odd.write(folder, {n: t.to(dtype) if not parts or any(p in n for p in parts) else t for n, t in chosen})

    return build


def saved_by_save_model(folder: Path) -> None:
    with odd.quiet():
        save_model(AutoModelForCausalLM.from_pretrained(folder), str(folder / odd.SINGLE))
    assert EMBEDDING not in odd.tensors(folder)


def base_alone(folder: Path) -> None:
    with odd.quiet():
        AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert "embed_tokens.weight" in odd.tensors(folder)


def said_to_be_tied(folder: Path) -> None:
    odd.edit(folder, tie_word_embeddings=True)


def head_twice(folder: Path) -> None:
    odd.write(folder, odd.tensors(folder) | {HEAD: odd.tensors(folder)[EMBEDDING]})


def head_of_the_embedding_rounded(folder: Path) -> None:
    odd.write(folder, odd.tensors(folder) | {HEAD: odd.tensors(folder)[EMBEDDING].bfloat16()})


def split(folder: Path, *, keep: bool = False, both: bool = False, more: dict[str, Any] | None = None) -> None:
    """Two parts and an index. `both`: the second repeats the norm; `more`: what else the index says."""
    tensors = odd.tensors(folder)
    parts = {"a.safetensors": dict(list(tensors.items())[:5]), "b.safetensors": dict(list(tensors.items())[5:])}
    index = {name: file for file, part in parts.items() for name in part} | (more or {})
    if both:
        parts["a.safetensors"]["model.norm.weight"] = tensors["model.norm.weight"] * 2
    for file, part in parts.items():
        odd.write(folder, part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if not keep:
        (folder / odd.SINGLE).unlink()


def old_parts_beside_one_file(folder: Path) -> None:
    split(folder, keep=True)
    odd.write(folder, {name: tensor * 2 for name, tensor in odd.tensors(folder).items()})


def in_place_of_the_model(name: str) -> Build:
    return lambda folder: (folder / odd.SINGLE).rename(folder / name)


def beside(name: str, content: str = "") -> Build:
    return lambda folder: (folder / name).write_text(content)


def fused(kind: str) -> Build:
    """The projections to queries, keys and values in one, their weights or their biases."""

    def build(folder: Path) -> None:
        tensors = odd.tensors(folder)
        parts = [tensors.pop(f"model.layers.0.self_attn.{part}_proj.{kind}") for part in "qkv"]
        odd.write(folder, tensors | {f"model.layers.0.self_attn.qkv_proj.{kind}": torch.cat(parts)})

    return build


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ADAPTER = json.dumps({"base_model_name_or_path": "some/model", "peft_type": "LORA"})
ONE = torch.ones(3)

# Each a kind of model, what is done to its folder, and the error, or None for what loads.
FORMS: dict[str, tuple[str, Build, str | None]] = {
    "tied, saved by save_model": ("tied", saved_by_save_model, None),
    "tied, head there too": ("tied", head_twice, None),
    "tied, head rounded": ("tied", head_of_the_embedding_rounded, None),
    "said to be tied, head differs": ("llama", said_to_be_tied, None),
    "said to be tied, head is longer": (
        "tied",
        with_tensors(lm_head__weight=torch.ones(99, 64)),
        r"lm_head.weight \(99, 64\), wanted \(97, 64\)",
    ),
    "not tied, no head": (
        "tied",
        lambda folder: odd.edit(folder, tie_word_embeddings=False),
        r"missing: lm_head.weight\n.*says tie_word_embeddings: true",
    ),
    "base model, tied": ("tied", base_alone, None),
    "base model, no head": ("llama", base_alone, "missing: lm_head.weight"),
    "prefix of DataParallel": ("llama", renamed(lambda name: f"module.{name}"), None),
    "prefix of torch.compile": ("tied", renamed(lambda name: f"_orig_mod.{name}"), None),
    "layers compiled one by one": (
        "llama",
        renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
        None,
    ),
    "prefix of a merged adapter": ("llama", renamed(lambda name: f"base_model.model.{name}"), None),
    "prefix twice": ("llama", renamed(lambda name: f"model.{name}"), None),
    "prefix of half": (
        "llama",
        renamed(lambda name: f"module.{name}" if "mlp" in name else name),
        r"unexpected: module.model.layers.0.mlp",
    ),
    "two models in one file": (
        "llama",
        with_tensors(ema__layers__0__input_layernorm__weight=ONE),
        "unexpected: ema.layers.0.input_layernorm.weight$",
    ),
    "frequencies of old files": ("llama", with_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=ONE), None),
    "bias of the head": ("llama", with_tensors(lm_head__bias=torch.ones(97)), "unexpected: lm_head.bias"),
    "head of a classifier": ("llama", with_tensors(score__weight=ONE), "unexpected: score.weight"),
    "biases unsaid": (
        "biased",
        lambda folder: odd.edit(folder, attention_bias=False),
        "unexpected: model.layers.0.self_attn.k_proj.bias",
    ),
    "biases said": ("biased", lambda folder: None, None),
    "fewer layers said": (
        "llama",
        with_tensors(model__layers__1__input_layernorm__weight=ONE),
        "unexpected: model.layers.1.input_layernorm.weight",
    ),
    "projections fused": (
        "llama",
        fused("weight"),
        "missing: .*k_proj.*unexpected: .*qkv_proj.weight",
    ),
    "Qwen2 without its biases": ("qwen2", without("bias"), r"missing: (.*_proj.bias(, )?){3}$"),
    "Qwen2 with a bias after attention": (
        "qwen2",
        with_tensors(model__layers__0__self_attn__o_proj__bias=torch.ones(64)),
        "unexpected: model.layers.0.self_attn.o_proj.bias",
    ),
    "Qwen2, biases fused": ("qwen2", fused("bias"), "missing: .*q_proj.bias.*unexpected: .*qkv_proj.bias"),
    "Qwen2 said to be Qwen3": (
        "qwen2",
        lambda folder: odd.edit(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=16),
        "missing: .*k_norm.weight.*unexpected: .*k_proj.bias",
    ),
    "Qwen3, biases unsaid": (
        "qwen3",
        with_tensors(model__layers__0__self_attn__k_proj__bias=torch.ones(32)),
        "unexpected: model.layers.0.self_attn.k_proj.bias",
    ),
    "Qwen3 without a norm": ("qwen3", without("k_norm"), "missing: model.layers.0.self_attn.k_norm.weight$"),
    "Qwen3, norm of all heads": (
        "qwen3",
        with_tensors(model__layers__0__self_attn__q_norm__weight=torch.ones(64)),
        r"q_norm.weight \(64,\), wanted \(16,\)",
    ),
    "names of Meta": ("llama", renamed(lambda name: name.replace("self_attn.q_proj", "attention.wq")), "attention.wq"),
    "all in float64": ("llama", cast(torch.float64), None),
    "norms in float64": ("llama", cast(torch.float64, "norm"), None),
    "mixed dtypes": ("llama", cast(torch.bfloat16, "mlp", "lm_head"), None),
    "float8": ("llama", cast(torch.float8_e4m3fn, "mlp"), r"unsupported types, .*mlp.down_proj.weight \(F8_E4M3\)"),
    "integers": ("llama", cast(torch.int8, "q_proj"), r"unsupported types, .*q_proj.weight \(I8\)"),
    "parts": ("llama", split, None),
    "one file and old parts": ("llama", old_parts_beside_one_file, None),
    "a part is missing": (
        "llama",
        lambda folder: split(folder, more={"x": "c.safetensors"}),
        "lacks files that .*index.json names: c.safetensors",
    ),
    "the index names what no part holds": ("llama", lambda folder: split(folder, more={"x": "a.safetensors"}), None),
    "the index names no file": ("llama", lambda folder: split(folder, more={"x": 3}), "names no file for x"),
    "a tensor in two parts": (
        "llama",
        lambda folder: split(folder, both=True),
        "model.norm.weight is in .*a.safe.*b.safe",
    ),
    "PyTorch's file beside": ("llama", beside("pytorch_model.bin", "not read"), None),
    "Mistral's own file beside": ("mistral", beside("consolidated.safetensors", "not read"), None),
    "PyTorch's file alone": (
        "llama",
        in_place_of_the_model("pytorch_model.bin"),
        "but pytorch_model.bin; only safetensors",
    ),
    "Mistral's own file alone": (
        "mistral",
        in_place_of_the_model("consolidated.safetensors"),
        "but consolidated.safetensors",
    ),
    "a variant alone": ("llama", in_place_of_the_model("model.fp16.safetensors"), "but model.fp16.safetensors"),
    "a .gguf file for weights": ("llama", in_place_of_the_model("model-Q4_K_M.gguf"), "but model-Q4_K_M.gguf"),
    "an adapter beside": (
        "llama",
        beside("adapter_config.json", ADAPTER),
        "adapter .* of 'some/model', which is not applied",
    ),
    "weights not fetched": ("llama", beside(odd.SINGLE, POINTER), "model.safetensors is .*pointer.*git lfs pull"),
    "config.json not fetched": ("llama", beside("config.json", POINTER), "config.json is .*pointer.*git lfs pull"),
}


@pytest.mark.parametrize("form", FORMS)
def test_folders_load_as_in_transformers_or_say_why_not(form, tmp_path):
    kind, build, message = FORMS[form]
    odd.copy(kind, tmp_path)
    clean = odd.theirs(tmp_path)
    build(tmp_path)
    if message is not None:
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
            models.load(tmp_path)
        return
    got, wanted = odd.ours(tmp_path), odd.theirs(tmp_path)
    assert not got.error
    # Names that transformers does not know it makes up numbers for; here they are those of the model that was renamed.
    assert wanted.logits is not None or "prefix" in form or "compiled" in form
    logits = clean.logits if wanted.logits is None else wanted.logits
    np.testing.assert_allclose(got.logits, logits, atol=TOLERANCE, rtol=0)


def test_a_head_that_differs_is_used_and_said(tmp_path, caplog):
    odd.copy("llama", tmp_path)
    without, _ = models.load(tmp_path)
    said_to_be_tied(tmp_path)
    with caplog.at_level(logging.WARNING, "mustafar_jax"):
        model, _ = models.load(tmp_path)
    assert "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight" in caplog.text
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(forward(model, odd.TOKENS), forward(without, odd.TOKENS))


def test_a_head_that_is_the_embedding_is_not_held_twice(tmp_path, caplog):
    head_twice(odd.copy("tied", tmp_path))
    with caplog.at_level(logging.WARNING, "mustafar_jax"):
        model, _ = models.load(tmp_path)
    assert not hasattr(model, "lm_head")
    assert not caplog.records


def test_parts_that_are_not_read_are_named(tmp_path, caplog):
    old_parts_beside_one_file(odd.copy("llama", tmp_path))
    with caplog.at_level(logging.WARNING, "mustafar_jax"):
        models.load(tmp_path)
    assert "holds model.safetensors, which is read, and a.safetensors, b.safetensors, which are not" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["b.gguf", "a.gguf"], r"has no config.json, but a.gguf, b.gguf: give the path of one of these$"),
        (["sub/config.json", "snapshots/1f/config.json"], r"but snapshots/1f, sub: give the path of one of these$"),
        (
            ["consolidated.00.pth", "params.json"],
            r"but consolidated.00.pth, params.json; Hugging Face's layout is wanted$",
        ),
        (["model.safetensors"], r"but model.safetensors; Hugging Face's layout is wanted$"),
        ([], r"has no config.json$"),
    ],
)
@pytest.mark.parametrize("read", [models.load, models.load_config])
def test_a_folder_without_config_json_says_what_it_holds(read, files, message, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path)


def test_an_adapter_alone_names_its_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    with pytest.raises(ValueError, match=r"an adapter .* of 'some/model', which is not applied here: merge it"):
        models.load(tmp_path)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model.model.", "base_model.model.model."])
@pytest.mark.parametrize("head", ["lm_head.weight", "module.lm_head.weight"])
def test_names_are_the_usual_ones_whatever_the_prefix(prefix, head):
    inner = ["embed_tokens.weight", "layers.0.input_layernorm.weight", "layers.10.mlp.up_proj.weight", "norm.weight"]
    given = {f"{prefix}{name}": name for name in inner} | {"score.weight": "score"}
    wanted = {f"model.{name}": name for name in inner} | {"score.weight": "score"}
    if prefix.startswith(head.removesuffix(HEAD)):
        given[head], wanted[HEAD] = "head", "head"
    assert with_usual_names(given) == wanted


@pytest.mark.parametrize(
    "names",
    [
        ["a.layers.0.input_layernorm.weight", "b.layers.0.input_layernorm.weight", "_orig_mod.x"],
        ["layers.0.input_layernorm.weight", "norm._orig_mod.weight", "norm.weight"],
        ["embed_tokens.weight"],
    ],
)
def test_names_stay_where_it_is_not_plain_what_they_stand_for(names):
    assert list(with_usual_names(dict.fromkeys(names))) == names


# Damaged folders


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        models.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"llama"'])
def test_a_config_that_is_no_json_object(text, tmp_path):
    odd.write_small(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (is not valid JSON|holds)"):
        models.load(tmp_path)


def test_weights_that_are_not_safetensors(tmp_path):
    odd.write_small(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors, but pytorch_model.bin; only safetensors"):
        models.load(tmp_path)


def test_no_weights(tmp_path):
    odd.write_small(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors.index.json nor model.safetensors$"):
        models.load(tmp_path)


def test_all_missing_shards_are_named(tmp_path):
    reference = LlamaForCausalLM(LlamaConfig(**TINY))
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    for name in shards[1:3]:
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names: {shards[1]}, {shards[2]}$"):
        models.load(tmp_path)


def test_an_index_without_a_weight_map(tmp_path):
    odd.write_small(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        models.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, 3000, -1])
def test_a_file_cut_short(kept, tmp_path):
    file = odd.write_small(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or cut short: "):
        models.load(tmp_path)


def test_all_tensors_of_unsupported_types_are_named(tmp_path):
    arrays = odd.small_arrays()
    for name in ("model.norm.weight", "lm_head.weight"):
        arrays[name] = arrays[name].astype(np.int8)
    with pytest.raises(ValueError, match=r"supported: lm_head.weight \(I8\), model.norm.weight \(I8\)"):
        models.load(odd.write_small(tmp_path, arrays))
