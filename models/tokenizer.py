"""Tokenizers from the metadata of GGUF files.

Transformers has a converter of its own, but it changes between releases and takes GPT-2's splitting of text where it
does not know a model's (SmolLM's, whose digits stand alone, among them), so the parts are put together here.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mustafar_jax.models.gguf import GGUFHeader, read_header

# Token types of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclasses.dataclass(frozen=True)
class _Splitting:
    """How text is cut before the merges: digits first where they stand alone, then by `pattern`."""

    pattern: str
    single_digits: bool = False
    whole_words: bool = False  # a piece that is a token as it stands is taken without merging
    add_bos: bool = False  # where the metadata does not say


_GPT2 = _Splitting(_GPT2_SPLIT)
_SMOLLM = _Splitting(_GPT2_SPLIT, single_digits=True)
_LLAMA3 = _Splitting(_LLAMA3_SPLIT, whole_words=True, add_bos=True)
_LLAMA3_MERGED = _Splitting(_LLAMA3_SPLIT)
_QWEN2 = _Splitting(_QWEN2_SPLIT)
_TEKKEN = _Splitting(_TEKKEN_SPLIT, whole_words=True, add_bos=True)

# `tokenizer.ggml.pre` -> splitting. Files without the key, or with "default", date from before it was written or hold
# a tokenizer that the converter did not know: they get GPT-2's.
_SPLITTINGS: dict[str, _Splitting] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SMOLLM),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _LLAMA3_MERGED),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}


def load_gguf_tokenizer(source: str | os.PathLike[str] | GGUFHeader) -> PreTrainedTokenizerFast | None:
    """Build the tokenizer that a GGUF file's metadata describe; None where the file holds none.

    Byte-level BPE ("gpt2") and SentencePiece BPE ("llama") vocabularies are supported. Control tokens are recognised
    in texts, the chat template is the file's, and bos and eos are added where the metadata say so (where they are
    silent: bos for SentencePiece, Llama 3 and Tekken vocabularies, as llama.cpp does). Imports no torch.

    Args:
        source: the file's path, or its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what `read_header` raises; another kind of tokenizer or splitting of text; metadata that are
            missing or contradict themselves.
    """
    header = source if isinstance(source, GGUFHeader) else read_header(source)
    vocabulary = _Vocabulary(header)
    model = vocabulary.get("model")
    if model in (None, "no_vocab", "none"):
        return None
    builders = {"gpt2": _byte_level_tokenizer, "llama": _sentencepiece_tokenizer}
    if model not in builders:
        raise vocabulary.error("model", f"is {model!r}; supported are {', '.join(map(repr, builders))}")
    vocabulary.check()
    backend, add_bos = builders[model](vocabulary)
    backend.add_tokens(_added_tokens(vocabulary))
    return _wrap(backend, vocabulary, add_bos)


class _Vocabulary:
    """The `tokenizer.ggml.*` metadata of one file, with what files may leave out filled in."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path, self.metadata = header.path, header.metadata
        # SentencePiece vocabularies may leave out the ids that Llama's has.
        self.default_ids = {"bos": 1, "eos": 2, "unknown": 0} if self.get("model") == "llama" else {}
        # Padding entries of some files have no text.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.get("tokens", []))]
        self.kinds: Sequence[int] = self.get("token_type") or [_NORMAL] * len(self.tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens)}

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{str(self.path)!r}: tokenizer.ggml.{key} {message}")

    def check(self) -> None:
        """Raise ValueError where tokens are missing or there twice, or lists differ in length."""
        if not self.tokens or not all(isinstance(token, str) for token in self.tokens):
            raise self.error("tokens", "is missing, empty or no list of texts")
        twice = sorted({token for index, token in enumerate(self.tokens) if self.ids[token] != index})
        if twice:
            raise self.error("tokens", f"holds {len(twice)} tokens more than once: {', '.join(map(repr, twice[:8]))}")
        for key in ("token_type", "scores"):
            length = len(self.get(key, self.tokens))
            if length != len(self.tokens):
                raise self.error(key, f"has {length} entries for {len(self.tokens)} tokens")

    def special(self, name: str) -> str | None:
        """The text of the bos, eos, unknown or padding token; None where there is none."""
        index = self.get(f"{name}_token_id")
        if index is None:
            index = self.default_ids.get(name, len(self.tokens))
            return self.tokens[index] if index < len(self.tokens) else None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise self.error(f"{name}_token_id", f"is {index!r}, the vocabulary has {len(self.tokens)} tokens")
        return self.tokens[index]


def _byte_level_tokenizer(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Returns the tokenizer and whether bos is added where the metadata do not say."""
    name = vocabulary.get("pre", "default")
    if name not in _SPLITTINGS:
        raise vocabulary.error("pre", f"is {name!r}; supported are {', '.join(_SPLITTINGS)}")
    splitting = _SPLITTINGS[name]
    backend = Tokenizer(
        BPE(vocab=vocabulary.ids, merges=_listed_merges(vocabulary), ignore_merges=splitting.whole_words)
    )
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    steps += [
        pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.add_bos


def _listed_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    merges = []
    for line in vocabulary.get("merges", ()):
        left, _, right = line.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise vocabulary.error("merges", f"has {line!r}, whose parts and whole must all be tokens")
        merges.append((left, right))
    if not merges:
        raise vocabulary.error("merges", "is missing or empty; a 'gpt2' tokenizer needs it")
    return merges


def _sentencepiece_tokenizer(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Returns the tokenizer and whether bos is added where the metadata do not say."""
    backend = Tokenizer(
        BPE(
            vocab=vocabulary.ids,
            merges=_implied_merges(vocabulary),
            unk_token=vocabulary.special("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spell = normalizers.Replace(" ", _SPACE)
    unspell = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spell])
        backend.decoder = decoders.Sequence([*unspell, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = spell
        backend.decoder = decoders.Sequence(unspell)
    return backend, True


def _implied_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece lists no merges: any two tokens whose concatenation is one merge, the highest score first.

    Where one token can be made in several ways, the longest left part comes first, as in Hugging Face's conversions.
    """
    scores = vocabulary.get("scores")
    if scores is None:
        raise vocabulary.error("scores", "is missing; a 'llama' tokenizer needs it")
    never = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    ids = {token: index for token, index in vocabulary.ids.items() if vocabulary.kinds[index] not in never}
    splits = [(token[:at], token[at:]) for token in ids for at in range(len(token) - 1, 0, -1)]
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    return sorted(merges, key=lambda merge: (-scores[ids[merge[0] + merge[1]]], -len(merge[0]), -len(merge[1])))


def _added_tokens(vocabulary: _Vocabulary) -> list[AddedToken]:
    """The tokens that are recognised whole wherever they stand in a text: control and user-defined ones."""
    named = {vocabulary.special(name) for name in ("bos", "eos", "unknown", "padding")}
    tokens = []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        special = kind in (_CONTROL, _UNKNOWN) or token in named
        if special or kind == _USER_DEFINED:
            tokens.append(AddedToken(token, special=special, normalized=False))
    return tokens


def _wrap(backend: Tokenizer, vocabulary: _Vocabulary, add_bos: bool) -> PreTrainedTokenizerFast:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    specials = {argument: vocabulary.special(name) for name, argument in names.items()}
    context = vocabulary.metadata.get("llama.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(vocabulary.get("add_bos_token", add_bos)),
        add_eos_token=bool(vocabulary.get("add_eos_token", False)),
        chat_template=_chat_template(vocabulary.metadata),
        clean_up_tokenization_spaces=False,
        **{argument: token for argument, token in specials.items() if token is not None},
        **({} if context is None else {"model_max_length": context}),
    )


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The file's template, or all of them by name where it has several."""
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates", ())
    named = {name: metadata[key] for name in names if (key := f"tokenizer.chat_template.{name}") in metadata}
    if not named:
        return default
    return named if default is None else {"default": default, **named}
