"""Tokenizers from folders in Hugging Face's layout.

Transformers reads them. What it cannot read is named here by folder and file, and so is what it would read in silence:
of its own errors many name neither, or a package that would not help.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from mustafar_jax.models.folder import is_lfs_pointer, is_there, lfs_message, read_json, read_text

_JSON = "tokenizer.json"
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt")  # read where there is no tokenizer.json
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = (_JSON, "tokenizer.model", "vocab.json", "tokenizer_config.json")
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates/*.jinja"
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")  # those of the `tokenizers` package
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_WANTED = "a tokenizer.json, as transformers' save_pretrained writes it"
_LONGEST = 300
"""Characters of another package's message that are shown."""


def load_folder_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as transformers reads it; None where there are no files of one.

    Code that the folder brings along is never run.

    Raises:
        ValueError: a file that cannot be read, or that asks for code of its own; named.
        FileNotFoundError: a link to a file that is missing.
    """
    if not any(is_there(folder / name) for name in _FILES):
        return None
    _check_whole(folder)
    _check_code(folder / "tokenizer_config.json")
    _check_packages(folder)
    from transformers import AutoTokenizer  # takes a second to import, and not every caller wants text

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some settings are looked at when a text comes
    except Exception as error:  # of many kinds, bare Exceptions among them
        raise _unreadable(folder, error) from error
    _check_syntax(tokenizer, folder / _TEMPLATE)
    return tokenizer


def _check_whole(folder: Path) -> None:
    """Raise an error for files that are empty, that stand for others, or that are no JSON or text, as wanted."""
    vocabularies = (_JSON,) if (folder / _JSON).exists() else _VOCABULARIES
    files = [folder / name for name in (*vocabularies, *_SETTINGS, _TEMPLATE) if is_there(folder / name)]
    for file in (*files, *sorted(folder.glob(_MORE_TEMPLATES))):
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
        if is_lfs_pointer(file):
            raise ValueError(lfs_message(file))
        if file.name in _SETTINGS:
            read_json(file)
        if file.suffix == ".jinja":
            read_text(file)


def _check_code(config: Path) -> None:
    auto_map = read_json(config).get("auto_map") if config.exists() else None
    wanted = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if wanted:
        raise ValueError(
            f"{config} asks for code of its own (auto_map: {wanted!r}), which is never run; wanted: {_WANTED}"
        )


def _check_packages(folder: Path) -> None:
    """Raise ValueError where transformers needs a package that is not installed to read tokenizer.model."""
    model = folder / "tokenizer.model"
    if (folder / _JSON).exists() or not model.exists():
        return
    with model.open("rb") as opened:
        tiktoken = _TIKTOKEN_LINE.fullmatch(opened.readline(1 << 10)) is not None
    needed = {"tiktoken": "tiktoken"} if tiktoken else {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    if missing := [package for module, package in needed.items() if not _is_installed(module)]:
        raise ValueError(
            f"{model} needs a package that is not installed: pip install {' '.join(missing)}; or add {_WANTED}"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _check_syntax(tokenizer: Any, template: Path) -> None:
    """Raise ValueError for a template that ends too early, or is no template; what it asks of messages is not tried."""
    from jinja2 import TemplateSyntaxError

    if not template.exists():
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{template}, line {error.lineno}, is no chat template: {error.message}") from error
    except Exception:  # of these messages; what is said of the user's own comes with them
        return


def _unreadable(folder: Path, error: Exception) -> ValueError:
    """What to say where transformers ended with this error: of the files that may be the reason, or of the folder."""
    file, model = folder / _JSON, folder / "tokenizer.model"
    if file.exists():
        try:
            reason = _why_no_tokenizer(read_json(file))
        except ValueError as damaged:
            return damaged
        if reason is not None:
            return ValueError(f"{file} {reason}")
        if settings := [str(folder / name) for name in _SETTINGS if (folder / name).exists()]:
            return ValueError(f"{' or '.join(settings)} holds what cannot be used: {_line(error)}")
    elif model.exists():
        return ValueError(f"{model} is no SentencePiece model, or cut short; fetch it again, or add {_WANTED}")
    return ValueError(f"the tokenizer of {folder} cannot be read; wanted: {_WANTED} ({_line(error)})")


def _why_no_tokenizer(content: dict[str, Any]) -> str | None:
    """Why this content of tokenizer.json makes no tokenizer, if it makes none."""
    from tokenizers import Tokenizer

    model = content.get("model")
    kind = model.get("type", _MODELS[0]) if isinstance(model, dict) else None
    if kind not in _MODELS:
        return f"has model.type={kind!r}; wanted one of {', '.join(_MODELS)}"
    try:
        Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # a bare one
        return f"cannot be read: {_line(error)}"
    return None


def _line(error: Exception) -> str:
    """An error's message on one line, cut where it is long."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= _LONGEST else message[: _LONGEST - 1] + "…"
