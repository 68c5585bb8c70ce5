"""Vocabularies as converters write them into GGUF files, and texts that are hard to cut."""

from pathlib import Path
from typing import Any

import pytest

from mustafar_jax.models.gguf import GGUFHeader
from mustafar_jax.models.tokenizer import load_gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind, and it'll sleep on.",
    "def keep_count(size, sparsity):\n    return -(-int(size * (1 - sparsity)) // 4) * 4\n\n\tif x:\n\t\tpass",
    "In 2024 there were 1234567 of them, 3.14159 each; 007 and 42, ①½.",
    "naïve café déjà vu, Ünïcödé, 日本語のテキスト, 한국어, русский текст, ελληνικά",
    "aaaa aaaaaaaa    bbbb   \n\n\n  cc\t\t dd  ",
] * 3
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "  leading and trailing  ",
    "\n",
    "don't DON'T we'LL I'Ve",
    "x = 10**9 + 7  # 1000000007",
    "emoji 🤖👩‍👩‍👧‍👦 ☃ and \x00 \u200b e\u0301",
    "tabs\t\t\tand\r\nlines\r\n\r\n",
]


def load(others: dict[str, Any] | None = None, **values: Any) -> Any:
    """The tokenizer of these `tokenizer.ggml` metadata, and of `others` in full; Any, since it may be None."""
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()} | (others or {})
    return load_gguf_tokenizer(GGUFHeader(Path("m.gguf"), metadata, {}, 0))


def train_sentencepiece(folder: Path, special: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    """Train a small SentencePiece model, tokenizer.model in the folder; what a converter would write of it.

    Args:
        folder: an empty folder.
        special: control tokens beside those of every model.
        options: of the trainer, beside Llama's.
    """
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the sentencepiece package")
    (folder / "corpus.txt").write_text("\n".join(CORPUS).replace("\x00", ""), encoding="utf-8")
    llama = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        control_symbols=list(special),
        minloglevel=2,
        **llama | options,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    kinds = [BYTE if model.is_byte(i) else CONTROL if model.is_control(i) else NORMAL for i in range(len(model))]
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in range(len(model))],
        "scores": [model.get_score(i) for i in range(len(model))],
        "token_type": [UNKNOWN, *kinds[1:]],
        "add_space_prefix": options.get("add_dummy_prefix", True),
    }
