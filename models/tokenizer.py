"""Tokenizers from the metadata of GGUF files.

Transformers has a converter of its own, but it changes between releases and takes GPT-2's splitting of text where it
does not know a model's (SmolLM's, whose digits stand alone, among them), so the parts are put together here.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from mustafar_jax.models.gguf import GGUFHeader, read_header

C = TypeVar("C")

# Token types of `tokenizer.ggml.token_type`; 0 is undefined.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = _TYPES = range(1, 7)

# The other `tokenizer.ggml` metadata that are read here, and what they hold.
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
_LISTS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "merges": (str, "texts"),
    "scores": ((int, float), "numbers"),
    "token_type": (int, "integers"),
}
# Those of other tokenizers of SentencePiece's, which rewrite a text before it is cut.
_REWRITING = ("precompiled_charsmap", "remove_extra_whitespaces")

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space

# SentencePiece's prefix: a space before the text, even where it begins with one, and none after a special token within
# it, as Hugging Face's tokenizers have it that are not `legacy`. Metaspace would leave out the first where there is one
# already; so the spaces, all spelled by then, do not show, and the prefix is spelled afterwards.
_FIRST_SPACE = (
    pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
    pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False),
)
# The unigram model would take the name of a byte, where a text holds it, for the byte.
_NO_BYTE_BY_NAME = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), behavior="isolated")

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
    composed: bool = False  # after characters and their accents are made one (Unicode's NFC)
    single_digits: bool = False
    whole_words: bool = False  # a piece that is a token as it stands is taken without merging
    add_bos: bool = False  # where the metadata does not say


_GPT2 = _Splitting(_GPT2_SPLIT)
_SMOLLM = _Splitting(_GPT2_SPLIT, single_digits=True)
_LLAMA3 = _Splitting(_LLAMA3_SPLIT, whole_words=True, add_bos=True)
_LLAMA3_MERGED = _Splitting(_LLAMA3_SPLIT)
_QWEN2 = _Splitting(_QWEN2_SPLIT, composed=True)
_STABLELM2 = _Splitting(_QWEN2_SPLIT)
_TEKKEN = _Splitting(_TEKKEN_SPLIT, whole_words=True, add_bos=True)

# `tokenizer.ggml.pre` -> splitting. Files without the key, or with "default", date from before it was written or hold
# a tokenizer that the converter did not know: they get GPT-2's.
_SPLITTINGS: dict[str, _Splitting] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SMOLLM),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _LLAMA3_MERGED),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez"), _STABLELM2),
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}


def load_gguf_tokenizer(source: str | os.PathLike[str] | GGUFHeader) -> PreTrainedTokenizerFast | None:
    """Build the tokenizer that a GGUF file's metadata describe; None where the file holds none.

    Byte-level BPE ("gpt2") and SentencePiece vocabularies ("llama": BPE, or a unigram model where the scores are log
    probabilities) are supported. Control tokens are recognised in texts, the chat template is the file's, and bos and
    eos are added where the metadata say so (where they are silent: bos for SentencePiece, Llama 3 and Tekken
    vocabularies, as llama.cpp does). Imports no torch.

    SentencePiece vocabularies give the tokens of the `sentencepiece` package, and around special tokens those of
    transformers' LlamaTokenizer with `legacy=False`: the space that is put before a text is not put after them.

    Args:
        source: the file's path, or its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what `read_header` raises; another kind of tokenizer or splitting of text; metadata that are
            missing or contradict themselves.
    """
    header = source if isinstance(source, GGUFHeader) else read_header(source)
    if header.metadata.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return None
    vocabulary = _Vocabulary(header)
    backend, add_bos = vocabulary.choose("model", _BUILDERS)(vocabulary)
    backend.add_tokens(_added_tokens(vocabulary))
    return _wrap(backend, vocabulary, add_bos)


class _Vocabulary:
    """The `tokenizer.ggml.*` metadata of one file, checked, with what files may leave out filled in."""

    def __init__(self, header: GGUFHeader) -> None:
        self.path, self.metadata, self.architecture = header.path, header.metadata, header.architecture
        self._check_types()
        # SentencePiece vocabularies may leave out the ids that Llama's has.
        self.default_ids = {"bos": 1, "eos": 2, "unknown": 0} if self.get("model") == "llama" else {}
        # Padding entries of some files have no text.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.get("tokens"))]
        self.kinds: Sequence[int] = self.get("token_type") or [_NORMAL] * len(self.tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self._check_values()

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def error(self, key: str, message: str) -> ValueError:
        return ValueError(f"{str(self.path)!r}: tokenizer.ggml.{key} {message}")

    def choose(self, key: str, choices: Mapping[str, C], default: str | None = None) -> C:
        """What the key's value stands for; ValueError where it is none of the choices."""
        name = self.get(key, default)
        if not isinstance(name, str) or name not in choices:
            raise self.error(key, f"is {name!r}; supported are {', '.join(map(repr, choices))}")
        return choices[name]

    def _check_types(self) -> None:
        """Raise ValueError where a value is of another type than its key's."""
        if not self.get("tokens") or not _is_list(self.get("tokens"), str):
            raise self.error("tokens", "is missing, empty or no list of texts")
        for key, (item, what) in _LISTS.items():
            if not _is_list(self.get(key, []), item):
                raise self.error(key, f"is no list of {what}")
        for key in _FLAGS:
            if not isinstance(self.get(key, False), bool):
                raise self.error(key, f"is {self.get(key)!r}; wanted true or false")

    def _check_values(self) -> None:
        """Raise ValueError where tokens are there twice, lists differ in length, or numbers mean nothing."""
        twice = sorted({token for index, token in enumerate(self.tokens) if self.ids[token] != index})
        if twice:
            raise self.error("tokens", f"holds {len(twice)} tokens more than once: {', '.join(map(repr, twice[:8]))}")
        for key in ("token_type", "scores"):
            length = len(self.get(key, self.tokens))
            if length != len(self.tokens):
                raise self.error(key, f"has {length} entries for {len(self.tokens)} tokens")
        unknown = sorted({kind for kind in self.kinds if kind not in (0, *_TYPES)})
        if unknown:
            raise self.error("token_type", f"has {', '.join(map(str, unknown))}; known types are 1 to 6")
        broken = [index for index, score in enumerate(self.get("scores", ())) if not math.isfinite(score)]
        if broken:
            raise self.error("scores", f"has {len(broken)} that are not finite, the first of token {broken[0]}")

    def special(self, name: str) -> str | None:
        """The text of the bos, eos, unknown or padding token; None where there is none."""
        index = self.get(f"{name}_token_id")
        if index is None:
            index = self.default_ids.get(name, len(self.tokens))
            return self.tokens[index] if index < len(self.tokens) else None
        if not _is_integer(index) or not 0 <= index < len(self.tokens):
            raise self.error(f"{name}_token_id", f"is {index!r}, the vocabulary has {len(self.tokens)} tokens")
        return self.tokens[index]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, item: type | tuple[type, ...]) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, item) for entry in value)


def _byte_level_tokenizer(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Returns the tokenizer and whether bos is added where the metadata do not say."""
    splitting = vocabulary.choose("pre", _SPLITTINGS, "default")
    backend = Tokenizer(
        BPE(vocab=vocabulary.ids, merges=_listed_merges(vocabulary), ignore_merges=splitting.whole_words)
    )
    if splitting.composed:
        backend.normalizer = normalizers.NFC()
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
    for key in _REWRITING:
        if vocabulary.get(key):
            raise vocabulary.error(key, "is set; supported are 'llama' tokenizers that take a text as it stands")
    unigram = _has_log_probabilities(vocabulary)
    backend = Tokenizer(_unigram(vocabulary) if unigram else _merging(vocabulary))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [_NO_BYTE_BY_NAME] if unigram and _BYTE in vocabulary.kinds else []
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", True):
        steps = [*_FIRST_SPACE, *steps]
        decoding.append(decoders.Strip(" ", 1, 0))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Sequence(decoding)
    return backend, True


def _has_log_probabilities(vocabulary: _Vocabulary) -> bool:
    """Whether the scores are a unigram model's; those of BPE are ranks, whole numbers. No key of the file tells."""
    scores = _scores(vocabulary)
    normal = [score for score, kind in zip(scores, vocabulary.kinds, strict=True) if kind == _NORMAL]
    return sum(score != round(score) for score in normal) > len(normal) / 2


def _scores(vocabulary: _Vocabulary) -> Sequence[float]:
    scores = vocabulary.get("scores")
    if scores is None:
        raise vocabulary.error("scores", "is missing; a 'llama' tokenizer needs it")
    return scores


def _unigram(vocabulary: _Vocabulary) -> Unigram:
    pieces = list(zip(vocabulary.tokens, _scores(vocabulary), strict=True))
    unknown = vocabulary.special("unknown")
    return Unigram(pieces, unk_id=None if unknown is None else vocabulary.ids[unknown], byte_fallback=True)


def _merging(vocabulary: _Vocabulary) -> BPE:
    return BPE(
        vocab=vocabulary.ids,
        merges=_implied_merges(vocabulary),
        unk_token=vocabulary.special("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )


def _implied_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece lists no merges: any two tokens whose concatenation is one merge, the highest score first.

    Where one token can be made in several ways, the longest left part comes first, as in Hugging Face's conversions.
    """
    scores = _scores(vocabulary)
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
            # User-defined tokens of spaces may be spelled either way; texts are searched as the normaliser spells them.
            spaces = kind == _USER_DEFINED and (_SPACE in token or " " in token)
            tokens.append(AddedToken(token, special=special, normalized=spaces))
    return tokens


# `tokenizer.ggml.model` -> what builds the tokenizer.
_BUILDERS: Mapping[str, Callable[[_Vocabulary], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level_tokenizer,
    "llama": _sentencepiece_tokenizer,
}


def _wrap(backend: Tokenizer, vocabulary: _Vocabulary, add_bos: bool) -> PreTrainedTokenizerFast:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    specials = {argument: vocabulary.special(name) for name, argument in names.items()}
    context = vocabulary.metadata.get(f"{vocabulary.architecture}.context_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=specials["bos_token"] is not None and vocabulary.get("add_bos_token", add_bos),
        add_eos_token=specials["eos_token"] is not None and vocabulary.get("add_eos_token", False),
        chat_template=_chat_template(vocabulary),
        clean_up_tokenization_spaces=False,
        **{argument: token for argument, token in specials.items() if token is not None},
        **({} if context is None else {"model_max_length": context}),
    )
    tokenizer.name_or_path = str(vocabulary.path)  # as an argument, it would be looked up on the hub
    return tokenizer


def _chat_template(vocabulary: _Vocabulary) -> str | dict[str, str] | None:
    """The file's template, or all of them by name where it has several."""
    metadata, key = vocabulary.metadata, "tokenizer.chat_template"
    names = metadata.get(f"{key}s", [])
    if not _is_list(names, str):
        raise ValueError(f"{str(vocabulary.path)!r}: {key}s is no list of texts")
    stored = {"default": key, **{name: f"{key}.{name}" for name in names}}
    templates = {name: metadata[key] for name, key in stored.items() if key in metadata}
    for name, template in templates.items():
        if not isinstance(template, str):
            raise ValueError(f"{str(vocabulary.path)!r}: {stored[name]} is {template!r}; wanted a text")
    return templates if len(templates.keys() - {"default"}) else templates.get("default")
