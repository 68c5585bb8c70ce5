"""SentencePiece tokenizers of GGUF files give the tokens of the model that they were made of."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.vocabularies import CONTROL, NORMAL, TEXTS, UNKNOWN, USER_DEFINED, load, train_sentencepiece

SPECIAL = ("[INST]", "[/INST]")
UNIGRAM = {"model_type": "unigram", "vocab_size": 360, "hard_vocab_limit": False}
MODELS: dict[str, dict[str, Any]] = {
    "BPE": {},
    "BPE without prefix": {"add_dummy_prefix": False},
    "BPE without bytes": {"byte_fallback": False, "vocab_size": 250},
    "unigram": UNIGRAM,
    "unigram without prefix": UNIGRAM | {"add_dummy_prefix": False},
    "unigram without bytes": UNIGRAM | {"byte_fallback": False, "vocab_size": 110},
}
# Where special tokens may stand, with and without spaces.
PROMPTS = [
    "[INST] Hi",
    "[INST]the dog",
    "[INST]  the dog",
    "[INST] the dog [/INST] sleep </s>",
    "[INST]the[/INST]dog</s><s>[INST]",
    " [INST] the",
    "the [INST]",
    "the dog</s>",
    "<s>the dog",
    "<s> the dog",
    "[INST]\n日本🤖[/INST]\n\n 12",
    "[INST] <0x41> <unk>",
    "\u2581the[INST]\u2581the",
]
WORDS = [*"the quick\n\t7é日🤖", " ", "  ", "\u2581", "dog", "don't", "<0x41>", *SPECIAL, "<s>", "</s>", " [INST] "]


class Trained(NamedTuple):
    """A trained model, the same without its prefix, and the metadata of its GGUF file; `folder` has tokenizer.model."""

    folder: Path
    model: Any
    bare: Any
    metadata: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """SentencePiece's tokens: of the text before the first special token with the prefix, of others without."""
        special = [*SPECIAL, "<s>", "</s>", "<unk>"]
        parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
        tokens = list(self.model.encode(parts[0]))
        for token, part in zip(parts[1::2], parts[2::2], strict=True):
            tokens += [self.model.piece_to_id(token), *self.bare.encode(part)]
        return tokens


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    metadata = train_sentencepiece(folder, SPECIAL, **MODELS[request.param])
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    model = SentencePieceProcessor(model_proto=proto.SerializeToString())
    proto.normalizer_spec.add_dummy_prefix = False
    return Trained(folder, model, SentencePieceProcessor(model_proto=proto.SerializeToString()), metadata)


@pytest.fixture(scope="module", params=[CONTROL, USER_DEFINED], ids=["control", "user-defined"])
def tokenizer(request, trained):
    """The tokenizer of the GGUF file, whose tokens of instructions are of either type."""
    metadata = trained.metadata
    kinds = list(metadata["token_type"])
    for token in SPECIAL:
        kinds[metadata["tokens"].index(token)] = request.param
    return load(**metadata | {"token_type": kinds, "add_bos_token": False})


@pytest.mark.parametrize("text", [*TEXTS, *PROMPTS])
def test_tokens_are_those_of_the_library(trained, tokenizer, text):
    assert tokenizer.encode(text) == trained.encode(text)


@given(text=st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_tokens_of_any_text_are_those_of_the_library(trained, tokenizer, text):
    ours, theirs = tokenizer.encode(text), trained.encode(text)
    if trained.metadata["scores"][-1] % 1:  # a unigram model: of cuts with the same probability any may come
        ours, theirs = sorted(ours), sorted(theirs)
    assert ours == theirs


@pytest.mark.parametrize("trained", ["BPE", "BPE without prefix"], indirect=True)  # what transformers' Llama has
@pytest.mark.parametrize("text", ["the dog", "", *PROMPTS])
def test_tokens_are_those_of_hugging_face_s_tokenizer(trained, tokenizer, text):
    from transformers import LlamaTokenizer

    prefix = trained.metadata["add_space_prefix"]
    reference = LlamaTokenizer.from_pretrained(trained.folder, legacy=False, add_prefix_space=prefix)
    theirs = reference.encode(text, add_special_tokens=False)
    if prefix and text[:1] in (" ", "\u2581"):  # where SentencePiece puts its prefix in front of a space, too
        theirs = reference.encode(" " + text, add_special_tokens=False)
    assert tokenizer.encode(text) == theirs


@pytest.mark.parametrize("trained", [name for name in MODELS if "bytes" not in name], indirect=True)
@pytest.mark.parametrize("text", [*TEXTS, *PROMPTS])
def test_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_a_space_after_a_special_token_is_not_doubled(kind):
    tokens = ["<unk>", "<s>", "</s>", "[INST]", "▁▁", "▁H", "Hi", "▁Hi", "▁", "H", "i"]
    types = [UNKNOWN, CONTROL, CONTROL, kind] + [NORMAL] * 7
    tokenizer = load(model="llama", tokens=tokens, scores=[0.0] * 4 + [-1.0, -2, -3, -4, -5, -6, -7], token_type=types)
    assert tokenizer.tokenize("[INST] Hi") == ["[INST]", "▁Hi"]
    assert tokenizer.tokenize("[INST]Hi") == ["[INST]", "Hi"]
    assert tokenizer.tokenize("Hi [INST]  Hi") == ["▁Hi", "▁", "[INST]", "▁▁", "Hi"]
    assert tokenizer.tokenize("Hi") == ["▁Hi"]


@pytest.mark.parametrize("spaces", ["   ", "▁▁▁"])  # no merges lead to three
def test_user_defined_tokens_of_spaces_are_found_however_they_are_spelled(spaces):
    tokens = ["<unk>", "<s>", "</s>", spaces, "▁", "a", "▁a"]
    types = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * 3
    tokenizer = load(model="llama", tokens=tokens, scores=[0.0] * 4 + [-1.0, -2, -3], token_type=types)
    ids = tokenizer.encode("a    a", add_special_tokens=False)
    assert ids == [6, 3, 6]
    assert tokenizer.decode(ids) == "a    a"
