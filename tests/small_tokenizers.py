"""Small tokenizers of every kind whose text depends on more than one token."""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

# Pieces that meet at what a clean-up takes away (" .", " n't", " ' "), at spaces, and within characters.
PIECES = ("a", "▁", "▁▁", ".", "?", "'", "▁'", "n", "'t", "n't", "m", "s", "▁'s", "v", "e", "r", "▁social", "é", "�")
PLAIN = tuple(dict.fromkeys(filter(None, (piece.strip("▁") for piece in PIECES))))
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def byte_level(words: tuple[str, ...] = (), **options: Any) -> PreTrainedTokenizerFast:
    """Every byte is a token, and <s> and </s>, and the words; <s> is put before each text."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = ("<s>", "</s>")
    for word in (*specials, *words):
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


def sentencepiece(*, prefix: bool = True, unigram: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Pieces and bytes as SentencePiece spells them; a text's first space is dropped where there is a prefix."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
    if unigram:
        backend = Tokenizer(Unigram([(token, -1.0) for token in tokens], unk_id=0, byte_fallback=True))
    else:
        ids = {token: index for index, token in enumerate(tokens)}
        backend = Tokenizer(BPE(ids, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    unspell = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*unspell, decoders.Strip(" ", 1, 0)] if prefix else unspell)
    backend.add_tokens([AddedToken("[think]", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )


def metaspace(**options: Any) -> PreTrainedTokenizerFast:
    """Pieces that are decoded one by one; the first loses its space."""
    backend = Tokenizer(WordLevel({piece: index for index, piece in enumerate(["<unk>", *PIECES])}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)


def word_pieces(*, cleanup: bool, **options: Any) -> PreTrainedTokenizerFast:
    """BERT's: words with spaces between them, and their ends without."""
    pieces = ["[UNK]", *PLAIN, *(f"##{piece}" for piece in PLAIN), "do", "not", "n't", "'m"]
    backend = Tokenizer(WordPiece({piece: index for index, piece in enumerate(dict.fromkeys(pieces))}))
    backend.decoder = decoders.WordPiece(cleanup=cleanup)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **options)


def suffixed(**options: Any) -> PreTrainedTokenizerFast:
    """The first BPE's: a mark ends a word, and the last word's is no space."""
    pieces = ["<unk>", *PLAIN, *(f"{piece}</w>" for piece in PLAIN)]
    backend = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)


def words(**options: Any) -> PreTrainedTokenizerFast:
    """Words without a decoder: all with spaces between them."""
    backend = Tokenizer(WordLevel({piece: index for index, piece in enumerate(["<unk>", *PLAIN])}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)


_FORCE = {
    "clean_up_tokenization_spaces": True,
    # transformers 5.6 and later leave BPE alone unless told so; earlier ones do not know the name.
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
}
_SPELLED = tuple(piece.replace("▁", "Ġ") for piece in PIECES if piece.strip("▁").isascii())

KINDS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_level,
    "bytes, cleaned up": lambda: byte_level(_SPELLED, **_FORCE),
    "bytes, cleaned up unless BPE": lambda: byte_level(_SPELLED, clean_up_tokenization_spaces=True),
    "SentencePiece": sentencepiece,
    "SentencePiece, cleaned up": lambda: sentencepiece(**_FORCE),
    "SentencePiece without prefix": lambda: sentencepiece(prefix=False),
    "unigram, cleaned up": lambda: sentencepiece(unigram=True, clean_up_tokenization_spaces=True),
    "Metaspace": metaspace,
    "Metaspace, cleaned up": lambda: metaspace(clean_up_tokenization_spaces=True),
    "word pieces": lambda: word_pieces(cleanup=False),
    "word pieces, cleaned up": lambda: word_pieces(cleanup=True, clean_up_tokenization_spaces=True),
    "suffixed": suffixed,
    "suffixed, cleaned up": lambda: suffixed(**_FORCE),
    "words": words,
    "words, cleaned up": lambda: words(clean_up_tokenization_spaces=True),
}
