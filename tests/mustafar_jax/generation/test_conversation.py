"""Conversations: what the model sees each turn, what its caches keep, and what a turn that fails leaves."""

import itertools
import json
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import mustafar_jax as mj
from mustafar_jax.generation import conversation, loop, text
from mustafar_jax.generation.messages import tokens_of
from mustafar_jax.models import Llama
from tests.mustafar_jax.generation.setting import CONFIGS, VOCABULARY, Compilations, always

ROLES = ("<user>", "<assistant>", "<system>", "</s>", "<date>")
WORDS = (*ROLES, *(f"w{number}" for number in range(VOCABULARY - len(ROLES))))
TURNS = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant> {% endif %}"
DATED = "<date> w{{ messages | length }} " + TEMPLATE
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content.split()[-1] if m.role == 'assistant' else m.content }}")
CAPACITY, NEW = 384, 9
DENSE: dict[str, Any] = {"capacity": CAPACITY, "max_new_tokens": NEW}


def tokenizer_with(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Words are tokens, and texts that the model writes are read as the same tokens."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """How many tokens of prompts passed the model, turn by turn."""
    counts: list[int] = []

    def stream(model, tokens, **options):
        counts.append(tokens.shape[1])
        return run(model, tokens, **options)

    run = loop.stream
    monkeypatch.setattr(loop, "stream", stream)
    return counts


def read_anew(talk: mj.Conversation, said: str) -> str:
    """What the model answers to all of a conversation, read as one prompt."""
    messages = [*talk.messages, {"role": "user", "content": said}]
    tokens = np.asarray([tokens_of(talk.tokenizer, messages)])
    options: dict[str, Any] = {"capacity": talk.capacity, "config": talk.config, "eos_id": WORDS.index("</s>")}
    result = mj.generate(talk.model, tokens, max_new_tokens=NEW, **options)
    return talk.tokenizer.decode(result.tokens[0, : int(result.lengths[0])], skip_special_tokens=True)


SAID = ["w1 w2 w3", "w9", "w4 w40 w7 w8 w11 w2", "w30 w1"]


def test_a_turn_answers_the_whole_conversation_and_reads_what_is_new(llama, passed):
    talk = mj.Conversation(llama, tokenizer_with(), [{"role": "system", "content": "w5 w6"}], **DENSE)
    for said in SAID:
        wanted, held = read_anew(talk, said), talk.num_tokens
        answer = talk.say(said)
        assert answer == wanted
        assert talk.messages[-2:] == [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        whole = tokens_of(talk.tokenizer, talk.messages)
        assert whole[: talk.num_tokens] == talk._tokens
        assert passed[-1] == len(tokens_of(talk.tokenizer, talk.messages[:-1])) - held
    assert [cache.lengths.tolist() for cache in talk._caches or ()] == [[talk.num_tokens]] * 2
    assert talk.nbytes == sum(cache.nbytes for cache in talk._caches or ())
    assert len({message["content"] for message in talk.messages}) == 9


@pytest.mark.parametrize("template", [DATED, FORGETFUL], ids=["dated", "forgetful"])
def test_where_the_template_rewrites_what_was_said_the_model_sees_what_it_says(llama, passed, template):
    talk = mj.Conversation(llama, tokenizer_with(template), **DENSE)
    for said in SAID:
        wanted = read_anew(talk, said)
        assert talk.say(said) == wanted
    whole = len(tokens_of(talk.tokenizer, talk.messages[:-1]))
    assert passed[-1] >= whole - 1 if template is DATED else passed[-1] < whole / 2


@pytest.mark.exhaustive
def test_what_is_packed_is_read_anew(llama, passed):
    options: dict[str, Any] = {**DENSE, "config": CONFIGS["recommended"]}
    talk = mj.Conversation(llama, tokenizer_with(), **options)
    talk.say(" ".join(f"w{number % 50}" for number in range(80)))
    talk.messages[0]["content"] = "w1 " + talk.messages[0]["content"]
    wanted = read_anew(talk, "w2")
    assert talk.say("w2") == wanted
    assert passed[-1] == len(tokens_of(talk.tokenizer, talk.messages[:-1]))


@pytest.mark.exhaustive
def test_twenty_turns_compile_three_programs_after_the_second(llama):
    talk = mj.Conversation(llama, tokenizer_with(), **{**DENSE, "max_new_tokens": 6}, config=CONFIGS["recommended"])
    talk.say("w1")
    talk.say("w2 w3")
    with Compilations() as compiled:
        for number in range(18):
            talk.say(" ".join(f"w{(number * 7 + word) % 50}" for word in range(70 if number == 9 else 1 + number % 4)))
    assert len(compiled) <= 3
    assert len(talk.messages) == 40


def test_undo_and_fork(llama):
    talk = mj.Conversation(llama, tokenizer_with(), **DENSE)
    first, second = talk.say(SAID[0]), talk.say(SAID[1])
    other = talk.fork()
    talk.undo()
    assert [message["content"] for message in talk.messages] == [SAID[0], first]
    assert talk.say(SAID[1]) == second
    assert other.messages == talk.messages
    wanted = read_anew(other, SAID[2])
    talk.say(SAID[3])
    assert other.say(SAID[2]) == wanted
    for _ in range(3):
        talk.undo()
    with pytest.raises(ValueError, match="there is no turn to undo"):
        talk.undo()
    assert talk.say(SAID[0]) == first


def test_a_saved_conversation_goes_on(one_layer, passed, tmp_path):
    talk = mj.Conversation(one_layer, tokenizer_with(), **DENSE, config=CONFIGS["recommended"])
    talk.save(tmp_path / "talk")
    assert mj.Conversation.load(tmp_path / "talk", one_layer, tokenizer_with()).num_tokens == 0
    for said in SAID[:2]:
        talk.say(said)
        talk.save(tmp_path / "talk")
    assert len(list((tmp_path / "talk").iterdir())) == 2
    again = mj.Conversation.load(tmp_path / "talk", one_layer, tokenizer_with(), max_new_tokens=NEW)
    assert (again.messages, again.capacity, again.config) == (talk.messages, CAPACITY, CONFIGS["recommended"])
    assert again.say(SAID[2]) == talk.say(SAID[2])
    assert passed[-1] == passed[-2] < 12
    other = Llama(one_layer.config, rngs=nnx.Rngs(7))
    with pytest.raises(ValueError, match="talk holds caches of another model, which has other embeddings"):
        mj.Conversation.load(tmp_path / "talk", other, tokenizer_with())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": None}, "says that it is of format None; wanted 'mustafar_jax conversation, version 2'"),
        ({"messages": "w1"}, "is damaged: messages is of type str; wanted a list"),
        ({"tokens": None}, "is damaged: 'NoneType' object is not iterable"),
        ({"tokens": ["w1"]}, "is damaged: tokens='w1' must be an integer"),
        ({"tokens": [-1]}, "is damaged: tokens=-1 must lie in 0 .. "),
        ({"tokens": [2**31]}, "is damaged: tokens=2147483648 must lie in 0 .. "),
        ({"turn": None}, "is damaged: turn=None must be an integer"),
        ({"tokens": [1]}, "is damaged: its caches do not hold the 1 tokens that it says"),
        ({"caches": 3}, "is damaged: caches=3 is no name of a file of caches"),
        ({"caches": "../caches-0.safetensors"}, "is damaged: caches='../caches-0.safetensors' is no name of a file"),
        ({"capacity": "many"}, "is damaged: capacity='many' must be an integer"),
        ({"config": {"k_sparsities": 0.5}}, "is damaged: .*k_sparsities"),
        ({"config": None}, "is damaged: .*"),
        ({"model": 1}, "holds caches of another model"),
    ],
)
def test_a_damaged_folder_is_named(one_layer, saved_talk, changed, message):
    file = saved_talk / "conversation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        mj.Conversation.load(saved_talk, one_layer, tokenizer_with())


@pytest.fixture(scope="module")
def said_once(one_layer, tmp_path_factory):
    """A folder with a conversation of one turn."""
    folder = tmp_path_factory.mktemp("talk")
    talk = mj.Conversation(one_layer, tokenizer_with(), **DENSE)
    talk.say(SAID[0])
    talk.save(folder)
    return folder


@pytest.fixture
def saved_talk(said_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(said_once, tmp_path / "copy")


@pytest.mark.parametrize("how", ["send", "close", "finish"])
def test_an_answer_that_is_stopped_is_what_was_said(llama, how):
    talk = mj.Conversation(llama, tokenizer_with(), **DENSE)
    pieces = talk.stream(SAID[2])
    shown = [next(pieces) for _ in range(3)]
    if how == "send":
        with pytest.raises(StopIteration):
            pieces.send(True)
    elif how == "close":
        pieces.close()
    else:
        assert text.finish(pieces)[0] == []
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    assert talk._tokens == tokens_of(talk.tokenizer, talk.messages)[: talk.num_tokens]
    wanted = read_anew(talk, SAID[3])
    assert talk.say(SAID[3]) == wanted


def test_an_answer_ends_before_a_stop_text(llama):
    talk = mj.Conversation(llama, tokenizer_with(), **DENSE)
    whole = talk.fork().say(SAID[0])
    words = whole.split()
    assert len(words) > 5
    stop = f"{words[2]} {words[3]}"
    stopped = mj.Conversation(llama, tokenizer_with(), **DENSE, stop=[stop, "never"])
    assert stopped.say(SAID[0]) == whole[: whole.index(stop)]
    wanted = read_anew(stopped, SAID[1])
    assert wanted.startswith(stopped.say(SAID[1]))


@pytest.mark.parametrize("pieces", [["ab", "cEN", "Dxy", "z"], ["abcENDxyz"], [*"abcENDxyz"], ["abcE", "NENDxyz"]])
def test_what_may_become_a_stop_text_waits(pieces):
    told: list[bool | None] = []

    def stream():
        for piece in pieces:
            told.append((yield piece))
            if told[-1]:
                break
        return "the end"

    steps = text.Returned(text._until(stream(), ("END", "never")))
    shown = list(steps)
    assert "".join(shown) == "".join(pieces).split("END")[0]
    assert steps.value == "the end"
    assert told[-1] is True
    assert not any("E" in piece for piece in itertools.islice(shown, len(shown) - 1) if "N" in "".join(pieces)[:3])


def test_what_only_began_as_a_stop_text_is_shown_at_the_end():
    def stream():
        yield from ("aE", "EN")
        return 7

    steps = text.Returned(text._until(stream(), ("END",)))
    assert list(steps) == ["a", "E", "EN"]
    assert steps.value == 7


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([{"role": "user", "contents": "w1"}], ValueError, r"messages\[0\] has the unknown field 'contents'"),
        ([{"role": "user", "content": "w1", "name": "x"}], ValueError, r"messages\[0\] has the unknown field 'name'"),
        ([{"role": "user"}], ValueError, r"messages\[0\] lacks 'content'"),
        ([{"role": "robot", "content": ""}], ValueError, r"messages\[0\]\['role'\]='robot' must be one of"),
        ([{"role": "user", "content": 3}], TypeError, r"messages\[0\]\['content'\] is of type int"),
        ([{"role": "user", "content": "\udc80"}], ValueError, r"messages\[0\]\['content'\]=.* holds bytes"),
        (["w1"], TypeError, r"messages\[0\] is of type str"),
        ({"role": "user"}, TypeError, "messages is of type dict; wanted a list of messages"),
        ([], ValueError, "messages ends with nothing; wanted a user's last"),
        ([{"role": "assistant", "content": "w1"}], ValueError, "messages ends with assistant"),
    ],
)
def test_messages_that_are_none_are_named(llama, messages, error, message):
    with pytest.raises(error, match=message):
        mj.chat(llama, tokenizer_with(), messages)


def test_chat_is_one_turn(llama):
    tokenizer = tokenizer_with()
    history = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9 w1"}]
    talk = mj.Conversation(llama, tokenizer, history, **DENSE)
    wanted = read_anew(talk, SAID[0])
    assert mj.chat(llama, tokenizer, [*history, {"role": "user", "content": SAID[0]}], max_new_tokens=NEW) == wanted
    assert mj.chat(llama, tokenizer, SAID[0], **DENSE) == mj.Conversation(llama, tokenizer, **DENSE).say(SAID[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 513}, ValueError, "capacity=513 must lie in 1 .. 512"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be an integer of at least 1"),
        ({"config": "fast"}, TypeError, "config='fast' must be a CompressionConfig"),
        ({"stop": [""]}, ValueError, "stop='' is empty"),
        ({"stop": [3]}, TypeError, "stop is of type int; wanted one text"),
        ({"messages": [{"role": "user", "text": "a"}]}, ValueError, "unknown field 'text'"),
        ({"messages": "w1"}, TypeError, "messages is of type str; wanted a list of messages"),
        ({"key": 5}, TypeError, "key=5 is of type int; wanted one jax.random.key"),
    ],
)
def test_arguments_of_a_conversation_are_checked_at_once(llama, options, error, message):
    with pytest.raises(error, match=message):
        mj.Conversation(llama, tokenizer_with(), **options)
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        mj.Conversation(llama, tokenizer_with(None))


def test_a_turn_that_cannot_be_leaves_the_conversation_as_it_was(llama):
    talk = mj.Conversation(llama, tokenizer_with(), **DENSE)
    talk.say(SAID[0])
    before, held = list(talk.messages), talk.num_tokens
    with pytest.raises(ValueError, match=r"the conversation's 4\d\d tokens leave no room in a capacity of 384"):
        talk.say("w1 " * 400)
    with pytest.raises(TypeError, match="text is of type int; wanted one text"):
        talk.say(3)
    talk.options["temperature"] = 1.0
    with pytest.raises(ValueError, match="key=None"):
        talk.say("w1")
    talk.options["temperature"] = 0.0
    assert (talk.messages, talk.num_tokens) == (before, held)
    late = talk.stream("w3")
    wanted = read_anew(talk, "w2")
    assert talk.say("w2") == wanted
    with pytest.raises(RuntimeError, match="the conversation has gone on since this stream was made"):
        next(late)


@pytest.mark.parametrize(
    "ends", [lambda stream: stream.close(), lambda stream: next(stream)], ids=["closed", "resumed"]
)
@pytest.mark.parametrize("then", [lambda talk: talk.say("w2"), lambda talk: talk.undo()], ids=["said", "undone"])
def test_a_stream_that_was_left_changes_nothing_later(llama, ends, then):
    talk = mj.Conversation(llama, tokenizer_with(), **DENSE)
    talk.say(SAID[0])
    left = talk.stream("w3")
    next(left)
    then(talk)
    before, held = list(talk.messages), talk.num_tokens
    try:
        ends(left)
    except RuntimeError as error:
        assert "the conversation has gone on" in str(error)  # noqa: PT017
    assert (talk.messages, talk.num_tokens) == (before, held)
    assert talk.say("w1") == talk.messages[-1]["content"]


@pytest.mark.exhaustive
def test_an_answer_takes_no_more_than_the_room(llama):
    talk = mj.Conversation(llama, tokenizer_with(), capacity=CAPACITY, max_new_tokens=100, eos_id=())
    talk.say("w1 " * (CAPACITY - 7))
    assert talk.num_tokens == CAPACITY
    with pytest.raises(ValueError, match="leave no room"):
        talk.say("w1")


def test_logits_that_are_not_finite_take_back_the_turn():
    model = always([np.nan] * VOCABULARY)
    talk = mj.Conversation(model, tokenizer_with(), capacity=CAPACITY)
    with pytest.raises(ValueError, match=re.escape("the model's logits are not finite")):
        talk.say("w1")
    assert talk.messages == []


@pytest.mark.exhaustive
def test_each_turn_draws_with_a_key_of_its_own(llama):
    options: dict[str, Any] = {**DENSE, "temperature": 3.0, "eos_id": ()}
    talk = mj.Conversation(llama, tokenizer_with(), key=jax.random.key(1), **options)
    again = talk.fork()
    answers = [talk.say("w1") for _ in range(3)]
    assert len(set(answers)) == 3
    assert [again.say("w1") for _ in range(3)] == answers


def test_the_room_is_within_the_context_unless_told(llama):
    assert mj.Conversation(llama, tokenizer_with()).capacity == 512 < conversation.CAPACITY
