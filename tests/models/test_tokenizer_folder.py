"""Tokenizers of folders: what cannot be read is named, before the weights are read, and no foreign code runs."""

import builtins
import importlib.util
import json
import re
import shutil
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mustafar_jax import models
from mustafar_jax.models import checkpoint
from mustafar_jax.models.tokenizer_folder import load_folder_tokenizer
from tests.models.vocabularies import train_sentencepiece
from tests.small_tokenizers import byte_level

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 9085657\n"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
JSON_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
DAMAGES = {
    "pointer": (POINTER, "is not the file itself but Git LFS's pointer to it: fetch it with `git lfs pull`"),
    "empty": ("", "is empty"),
    "no text": (b"\xff\xfe\x00", "is not UTF-8 text"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a small model and every file of its tokenizer."""
    folder = tmp_path_factory.mktemp("good")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes)).save_pretrained(folder)
    byte_level(chat_template=TEMPLATE).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"</s>": 257}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy of the good folder, whose weights may not be read, nor a question be asked."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read, or a question was asked")

    monkeypatch.setattr(checkpoint, "load_weights", never)
    monkeypatch.setattr(builtins, "input", never)
    return shutil.copytree(good, tmp_path / "model")


def change(file, **fields):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as raised:
        models.load(folder)
    assert "\n" not in str(raised.value)


def test_a_good_folder_is_read(good):
    _, tokenizer = models.load(good)
    assert tokenizer.encode("ab") == byte_level().encode("ab")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


@pytest.mark.parametrize("file", [*JSON_FILES, "chat_template.jinja", "additional_chat_templates/rag.jinja"])
@pytest.mark.parametrize(("content", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_named(folder, file, content, message):
    (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(folder, f"^{re.escape(str(folder / file))} {re.escape(message)}")


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_json_that_is_cut_short_is_named(folder, file, share):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(len(content) * share)])
    refused(folder, f"^{re.escape(str(folder / file))} is not valid JSON, or cut short")


@pytest.mark.parametrize("file", JSON_FILES)
def test_json_of_another_kind_is_named(folder, file):
    (folder / file).write_text("[1]")
    refused(folder, f"^{re.escape(str(folder / file))} holds list, an object is wanted")


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_chat_template_that_is_cut_short_is_named(folder, share):
    file = folder / "chat_template.jinja"
    file.write_text(TEMPLATE[: int(len(TEMPLATE) * share)])
    refused(folder, f"^{re.escape(str(file))}, line 1, is no chat template: ")


def test_a_chat_template_that_raises_is_none_of_loading_s_business(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('a system message is needed') }}")
    assert load_folder_tokenizer(folder).chat_template["default"].startswith("{{ raise")


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        ({"model": {"type": "Frob", "vocab": {}}}, "has model.type='Frob'; wanted one of BPE, Unigram, WordLevel, "),
        ({"model": None}, "has model.type=None; wanted one of BPE, Unigram"),
        ({"model": {"type": "Unigram"}}, "cannot be read: "),
        ({"decoder": {"type": "Frob"}}, "cannot be read: "),
        ({"pre_tokenizer": {"type": "Frob"}}, "cannot be read: "),
        ({"version": "7.0"}, "cannot be read: "),
    ],
)
def test_a_tokenizer_that_is_unknown_is_named(folder, change_to, message):
    change(folder / "tokenizer.json", **change_to)
    refused(folder, f"^{re.escape(str(folder / 'tokenizer.json'))} {re.escape(message)}")


@pytest.mark.parametrize(
    "fields",
    [
        {"bos_token": 5},
        {"added_tokens_decoder": ["<s>"]},
        {"padding_side": "middle"},
        {"model_max_length": "long"},  # is looked at when a text comes
    ],
)
def test_settings_that_cannot_be_used_are_named(folder, fields):
    (folder / "special_tokens_map.json").unlink()
    (folder / "added_tokens.json").unlink()
    change(folder / "tokenizer_config.json", **fields)
    refused(folder, f"^{re.escape(str(folder / 'tokenizer_config.json'))} holds what cannot be used: .")


def test_settings_that_lead_nowhere_are_named(folder):
    (folder / "special_tokens_map.json").unlink()
    (folder / "special_tokens_map.json").symlink_to("../blobs/1f")
    with pytest.raises(FileNotFoundError, match=r"special_tokens_map\.json is a link to \.\./blobs/1f, which"):
        load_folder_tokenizer(folder)


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["code.Own", None]}, {"AutoTokenizer": "code.Own"}, ["code.Own"]]
)
@pytest.mark.parametrize("tokenizer_class", ["Own", "LlamaTokenizer"])
@pytest.mark.parametrize("config", ["llama", None])
def test_code_of_a_folder_is_neither_run_nor_asked_for(folder, auto_map, tokenizer_class, config):
    file = folder / "tokenizer_config.json"
    change(file, auto_map=auto_map, tokenizer_class=tokenizer_class)
    (folder / "code.py").write_text("raise AssertionError('foreign code was run')")
    if config is None:
        (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} asks for code of its own \(auto_map: .*never run"):
        load_folder_tokenizer(folder)


def test_code_of_the_model_s_is_none_of_the_tokenizer_s(folder):
    change(folder / "config.json", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise AssertionError('foreign code was run')")
    assert load_folder_tokenizer(folder).encode("ab") == byte_level().encode("ab")


@pytest.fixture
def sentencepiece_folder(folder):
    """The folder with tokenizer.model in place of all else."""
    for name in (*JSON_FILES, "chat_template.jinja"):
        (folder / name).unlink()
    train_sentencepiece(folder)
    return folder


def test_tokenizer_model_alone_is_read(sentencepiece_folder):
    change(sentencepiece_folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert load_folder_tokenizer(sentencepiece_folder).tokenize("the dog") == ["▁the", "▁dog"]


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_tokenizer_model_alone_names_the_package_that_it_needs(folder, monkeypatch, missing):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    find = importlib.util.find_spec
    present = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (
            None if name == missing else present if name in ("sentencepiece", "google.protobuf") else find(name)
        ),
    )
    package = missing.removeprefix("google.")
    file = re.escape(str(folder / "tokenizer.model"))
    refused(folder, f"^{file} needs a package that is not installed: pip install {package}; or add a tokenizer.json")


def test_tiktoken_s_files_are_not_taken_for_sentencepiece_s(folder):
    if importlib.util.find_spec("tiktoken") is not None:
        pytest.skip("needs an environment without tiktoken")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    refused(folder, r"tokenizer\.model needs a package that is not installed: pip install tiktoken; or add a tokenizer")


@pytest.mark.parametrize("content", [POINTER, "", "hello"])
def test_a_damaged_tokenizer_model_is_named(sentencepiece_folder, content):
    (sentencepiece_folder / "tokenizer.model").write_text(content)
    refused(sentencepiece_folder, rf"^{re.escape(str(sentencepiece_folder / 'tokenizer.model'))} is ")


def test_a_tokenizer_model_that_is_cut_short_is_named(sentencepiece_folder):
    file = sentencepiece_folder / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:3000])
    refused(sentencepiece_folder, rf"^{re.escape(str(file))} is no SentencePiece model, or cut short")


def test_what_is_not_read_may_be_a_pointer(folder):
    (folder / "tokenizer.model").write_text(POINTER)
    assert load_folder_tokenizer(folder).encode("ab") == byte_level().encode("ab")


def test_a_folder_without_a_vocabulary_is_named(folder):
    for name in ("tokenizer.json", "added_tokens.json"):
        (folder / name).unlink()
    refused(folder, f"^the tokenizer of {re.escape(str(folder))} cannot be read; wanted: a tokenizer.json")


def test_a_folder_without_files_of_a_tokenizer_has_none(tmp_path):
    assert load_folder_tokenizer(tmp_path) is None
