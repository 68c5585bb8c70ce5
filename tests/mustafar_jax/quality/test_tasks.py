"""What the evaluations ask, and what they say of bad data."""

import argparse
import json
import pathlib
import re
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mustafar_jax.quality import choice, longbench, metrics, needle, perplexity, ruler
from mustafar_jax.quality.examples import first_tokens, read_rows, read_text, tokens_after, tokens_of
from mustafar_jax.quality.tasks import TASKS

SENTENCES = " ".join(f"Sentence {i} tells of nothing much." for i in range(400))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(SENTENCES, encoding="utf-8")
    return file


def jsonl(folder, name, *rows):
    file = folder / name
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return file


def decoded(tokenizer, example):
    return tokenizer.decode(example.prompt, skip_special_tokens=True)


def shown(problems, folder):
    """With the files' names instead of their paths."""
    return [str(problem).replace(f"{folder}/", "") for problem in problems]


# texts and needles


def test_windows_lie_at_even_distances(byte_tokenizer, text):
    found = perplexity.examples(byte_tokenizer, [text], windows=3, prompt=50, continuation=20)
    assert [(len(example.prompt), len(example.gold)) for example in found] == [(50, 20)] * 3
    starts = [int(example.id.split(":")[1]) for example in found]
    assert starts == [0, (len(SENTENCES) - 70) // 2, len(SENTENCES) - 70]
    for example, start in zip(found, starts, strict=True):
        assert example.prompt[0] == byte_tokenizer.bos_token_id
        whole = byte_tokenizer.decode(np.concatenate([example.prompt[1:], example.gold]))
        assert whole == SENTENCES[start : start + 69]
    [middle] = perplexity.examples(byte_tokenizer, [text], windows=1, prompt=50, continuation=20)
    assert middle.id == found[1].id
    with pytest.raises(ValueError, match=r"text.txt has \d+ tokens; 3 windows of 5500 need 16500"):
        perplexity.examples(byte_tokenizer, [text], windows=3, prompt=5000, continuation=500)


@pytest.mark.parametrize("kind", ["needle", "passkey"])
def test_needles_stand_where_they_should(byte_tokenizer, text, kind):
    where = {"lengths": [400, 700], "depths": 5, "repeats": 2}
    found = needle.passkeys(byte_tokenizer, **where)
    if kind == "needle":
        found = needle.needles(byte_tokenizer, text, **where)
    assert len({example.id for example in found}) == len(found) == 20
    for example in found:
        prompt, answer = decoded(byte_tokenizer, example), example.info["answer"]
        assert len(example.prompt) == example.info["length"]
        assert byte_tokenizer.decode(example.gold) == f" {answer}"
        fact = re.search(rf"(?:number of (\w+)|pass key) is {answer}\.", prompt)
        question = re.search(r"\n\nQuestion: .*(?:number of (\w+)|pass key)\?\nAnswer: .* is$", prompt)
        assert fact[1] == question[1]
        before = prompt[: fact.start()].rpartition(" The ")[0]
        end = fact.end() if kind == "needle" else prompt.index(" is the pass key.") + len(" is the pass key.")
        hay = len(before) + question.start() - end
        assert len(before) / hay == pytest.approx(example.info["depth"], abs=0.1)
        assert before == "" or before.endswith(".") or example.info["depth"] == 1
    assert len({example.info["answer"] for example in found}) > 15


def test_needles_need_room(byte_tokenizer, text):
    with pytest.raises(ValueError, match="length=50 leaves no room for text beside"):
        needle.needles(byte_tokenizer, text, lengths=[50])
    with pytest.raises(ValueError, match=r"has \d+ tokens; a haystack of 99999 needs as many"):
        needle.needles(byte_tokenizer, text, lengths=[99999])


def test_no_blank_is_doubled_before_facts_and_answers(prepend_tokenizer, tmp_path):
    """By tokenizers that put one before every text."""
    file = tmp_path / "text.txt"
    file.write_text("Short." * 300)  # ends without a blank, wherever it is cut
    row = {"context": "Short.", "question": "When?", "choices": ["now", "then"], "answer": 0}
    choices, _ = choice.examples(prepend_tokenizer, [jsonl(tmp_path, "law.jsonl", row)], context=400)
    hidden = needle.needles(prepend_tokenizer, file, lengths=[400], depths=3)
    tasks = ["niah_multivalue", "niah_multikey_2", "niah_single_2"]
    written, _ = ruler.examples(prepend_tokenizer, file, tasks=tasks, lengths=[1200], samples=1)
    for example in [*hidden, *choices, *written]:
        whole = prepend_tokenizer.decode([*example.prompt, *(() if example.gold is None else example.gold)])
        assert not re.search(r"  | \n", whole)
    passkeys = needle.passkeys(prepend_tokenizer, lengths=[400], depths=3)
    assert "  " not in decoded(prepend_tokenizer, passkeys[1])
    assert {len(example.gold) for example in hidden + passkeys} == {8}  # a blank and seven digits
    assert [len(example.gold) for example in choices] == [4, 5]


def test_tokens_after(byte_tokenizer, prepend_tokenizer):
    for tokenizer in (byte_tokenizer, prepend_tokenizer):
        whole = tokens_of(tokenizer, "one two")
        assert tokens_of(tokenizer, "one") + tokens_after(tokenizer, " two", before="one") == whole
    merged = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])))
    assert tokens_after(merged, "b", before="a") == [1]  # "ab" is one token


# RULER


def question_row(i, name, told=3):
    return {
        "question": f"Who is {i}?",
        "answers": [f"{name} {i}", "x", ""],
        "documents": [f"Person {i} is {name} {i}." + " Much else is told of them." * told],
    }


@pytest.fixture
def question_files(tmp_path):
    squad, hotpot = ([question_row(i, name) for i in range(40)] for name in ("Ann", "Ben"))
    return [jsonl(tmp_path, "squad.jsonl", *squad), jsonl(tmp_path, "hotpot.jsonl", *hotpot, '{"question": "?"}')]


def test_ruler_makes_thirteen_tasks_that_can_be_answered(byte_tokenizer, text, question_files, tmp_path):
    found, problems = ruler.examples(byte_tokenizer, text, questions=question_files, lengths=[3000], samples=2)
    assert shown(problems, tmp_path) == ["hotpot.jsonl:41: no field 'answers'; it has ['question']"]
    assert len(ruler.TASKS) == 13
    assert sorted({example.group for example in found}) == sorted(f"{name} 3000" for name in ruler.TASKS)
    for example in found:
        name, prompt = example.group.split()[0], decoded(byte_tokenizer, example)
        answers, body = example.info["answers"], prompt.rpartition("\n\nQuestion: ")[0]
        assert example.prompt[0] == byte_tokenizer.bos_token_id
        assert len(example.prompt) + example.max_new_tokens <= 3000
        assert len(example.prompt) + example.max_new_tokens > 2000  # the text fills the length
        assert any(answer in body for answer in answers) if name.startswith("qa") else all(a in body for a in answers)
        assert example.score(", ".join(answers).upper()) == 1
        assert example.score("something else") == 0
        assert [task for task, answer in (("qa_1", "Ann "), ("qa_2", "Ben ")) if answer in body] == [name] * (
            name.startswith("qa")
        )
        if not name.startswith("qa") and len(answers) > 1:
            assert example.score(answers[0]) == pytest.approx(1 / len(answers))


def test_ruler_counts_its_answers(byte_tokenizer, text):
    names = ["niah_multikey_1", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"]
    found, _ = ruler.examples(byte_tokenizer, text, tasks=names, lengths=[9000], samples=1)
    answers = {example.group.split()[0]: example.info["answers"] for example in found}
    prompts = {example.group.split()[0]: decoded(byte_tokenizer, example) for example in found}
    assert {name: len(each) for name, each in answers.items()} == {
        "niah_multikey_1": 1,
        "niah_multikey_3": 1,
        "niah_multivalue": 4,
        "niah_multiquery": 4,
        "vt": 5,
        "cwe": 10,
        "fwe": 3,
    }
    needles = {name: len(re.findall(NEEDLE, prompt)) for name, prompt in prompts.items()}
    assert (needles["niah_multikey_1"], needles["niah_multivalue"], needles["niah_multiquery"]) == (4, 4, 4)
    assert needles["niah_multikey_3"] > 15
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompts["vt"]))
    value = re.search(r"hold the value (\d+)", prompts["vt"])[1]
    chain = [value]
    while len(chain) <= 5:
        chain.append(next(name for name, held in assigned.items() if held == chain[-1]))
    assert chain[1:] == answers["vt"]
    listed = re.findall(r"\d+\. (\w+)", prompts["cwe"].partition("\n\nQuestion")[0])
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == 30} == set(answers["cwe"])
    assert {count for word, count in counts.items() if word not in answers["cwe"]} == {3}
    written = Counter(prompts["fwe"].partition("\n\nQuestion")[0].split("\n\n")[1].split())
    (dots, noise), *ranked = written.most_common()
    assert dots == "..."
    assert [word for word, _ in ranked[:3]] == answers["fwe"]
    # The k-th of n words stands there 6 / (pi k)**2 n times, rounded down.
    shares = [(noise, 1), *((times, rank) for rank, (_, times) in enumerate(ranked[:3], 2))]
    low = max(times * np.pi**2 * rank**2 / 6 for times, rank in shares)
    assert low < min((times + 1) * np.pi**2 * rank**2 / 6 for times, rank in shares)
    assert ranked[2][1] > ranked[3][1]


NEEDLE = r"One of the secret \w+ of (\S+) is (\S+)\."


def test_one_answer_is_asked_for_in_the_singular(byte_tokenizer, text):
    names = ["niah_single_3", "niah_multivalue", "niah_multiquery"]
    found, _ = ruler.examples(byte_tokenizer, text, tasks=names, lengths=[1200], samples=1)
    single, value, query = (decoded(byte_tokenizer, example).rpartition("\n\n")[2] for example in found)
    assert re.fullmatch(
        r"Question: What is the secret uuid of (\w+) in the text\?\nAnswer: In the text, the secret uuid of \1 is",
        single,
    )
    assert re.fullmatch(
        r"Question: What are all the secret numbers of (\w+) in the text\?\n"
        r"Answer: In the text, the secret numbers of \1 are",
        value,
    )
    assert re.search(r"the secret numbers of \w+, \w+, \w+ and \w+ are$", query)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_haystacks_of_needles_differ_and_hold_the_one_that_is_asked_for(byte_tokenizer, text, task):
    make = {"tasks": [task], "lengths": [2000], "samples": 2}
    found = [each for seed in (0, 1) for each in ruler.examples(byte_tokenizer, text, seed=seed, **make)[0]]
    needles = [re.findall(NEEDLE, decoded(byte_tokenizer, example)) for example in found]
    for example, pairs in zip(found, needles, strict=True):
        asked = re.search(r"What is the secret \w+ of (\S+) in", decoded(byte_tokenizer, example))[1]
        assert [[value] for key, value in pairs if key == asked] == [example.info["answers"]]
        assert len(dict(pairs)) == len(pairs)
    assert len({pair for pairs in needles for pair in pairs}) == sum(map(len, needles))


def test_distractors_leave_out_what_is_asked_for(byte_tokenizer):
    """Longer haystacks begin as shorter ones do, too."""
    task = ruler.TASKS["niah_multikey_2"].make
    first = ruler.Source(np.random.default_rng(0), byte_tokenizer, []).words(1)
    taken, every = (
        task._others(ruler.Source(np.random.default_rng(0), byte_tokenizer, []), asked) for asked in (first, [])
    )
    listed = [next(every) for _ in range(5)]
    assert first[0] in listed[0]
    assert [next(taken) for _ in range(4)] == listed[1:]


def test_a_short_text_is_repeated(byte_tokenizer, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("It is short. ")
    found, _ = ruler.examples(byte_tokenizer, file, tasks=["niah_single_2", "niah_single_1"], lengths=[900], samples=2)
    assert [len(example.prompt) + example.max_new_tokens for example in found] == [900] * 4


@pytest.mark.parametrize(
    ("task", "length"), [("niah_multivalue", 450), ("niah_multiquery", 500), ("vt", 240), ("cwe", 600), ("fwe", 400)]
)
def test_ruler_names_the_task_that_there_is_no_room_for(byte_tokenizer, text, task, length):
    with pytest.raises(
        ValueError, match=rf"length={length} leaves no room for {task}: there is no room for a text in \d+ "
    ):
        ruler.examples(byte_tokenizer, text, tasks=[task], lengths=[length], samples=1)


def test_questions_are_asked_once_each_and_rows_that_do_not_fit_left_out(byte_tokenizer, text, tmp_path):
    rows = [
        question_row(0, "Ann"),
        question_row(1, "Ann", told=100),
        question_row(2, "Ann"),
        question_row(3, "Ann", 15),
    ]
    rows[0]["documents"] += rows[2]["documents"] + rows[3]["documents"]
    file = jsonl(tmp_path, "squad.jsonl", *rows)
    make = {"tasks": ["qa_1"], "questions": [file], "samples": 4}
    found, problems = ruler.examples(byte_tokenizer, text, lengths=[900], **make)
    asked = [re.search(r"Who is (\d)\?", decoded(byte_tokenizer, example))[1] for example in found]
    assert sorted(asked) == ["0", "2", "3"]
    assert shown(problems, tmp_path) == [
        "squad.jsonl: 3 rows to ask at length=900; wanted samples=4",
        "squad.jsonl:2: length=900 leaves no room for qa_1: there is no room for a text in 771 tokens",
    ]
    found, [problem] = ruler.examples(byte_tokenizer, text, lengths=[200, 4000], **make)
    for example in found:
        assert sorted(re.findall(r"Person (\d)", decoded(byte_tokenizer, example))) == ["0", "1", "2", "3"]  # each once
    assert str(problem).startswith(f"{file}: no row fits; length=200 leaves no room for qa_1: ")


def test_ruler_keeps_what_other_files_are_good_for(byte_tokenizer, text, question_files, tmp_path):
    bad = jsonl(tmp_path, "bad.jsonl", question_row(0, "Ann") | {"answers": [["x"]]}, {"question": 1})
    make = {"lengths": [600], "samples": 1}
    found, problems = ruler.examples(
        byte_tokenizer, text, tasks=["qa_1", "qa_2"], questions=[bad, question_files[0]], **make
    )
    assert [example.group for example in found] == ["qa_2 600"]
    assert shown(problems, tmp_path) == [
        "bad.jsonl: no usable line; the first problem is in line 1: field 'answers' holds ['x']; wanted text"
    ]
    with pytest.raises(ValueError, match=r"nothing to evaluate: .*bad.jsonl: no usable line"):
        ruler.examples(byte_tokenizer, text, tasks=["qa_1"], questions=[bad], **make)
    with pytest.raises(ValueError, match=r"questions names 3 files; wanted one for each of"):
        ruler.examples(byte_tokenizer, text, questions=[bad] * 3)


def test_ruler_is_the_same_again_and_asks_for_its_files(byte_tokenizer, text, question_files):
    make = {"lengths": [2000], "samples": 1}
    first, second = (ruler.examples(byte_tokenizer, text, tasks=["fwe", "vt"], **make)[0] for _ in range(2))
    alone = ruler.examples(byte_tokenizer, text, tasks=["vt"], **make)[0]
    for a, b in zip([*first, first[1]], [*second, *alone], strict=True):
        np.testing.assert_array_equal(a.prompt, b.prompt)
    assert len(ruler.examples(byte_tokenizer, text, questions=question_files[:1], **make)[0]) == 12
    with pytest.raises(ValueError, match="qa_2 needs 2 question files; got 1"):
        ruler.examples(byte_tokenizer, text, tasks=["qa_2"], questions=question_files[:1])
    with pytest.raises(ValueError, match=r"questions names 1 files, the last for qa_1; tasks=\['vt'\] lacks it"):
        ruler.examples(byte_tokenizer, text, tasks=["vt"], questions=question_files[:1])
    with pytest.raises(ValueError, match="task 'niah' is none of"):
        ruler.examples(byte_tokenizer, text, tasks=["niah"])
    with pytest.raises(ValueError, match="length=200 leaves no room for cwe"):
        ruler.examples(byte_tokenizer, text, tasks=["cwe"], lengths=[200])
    with pytest.raises(ValueError, match=r"there is no room for a text in \d+ tokens"):
        ruler.examples(byte_tokenizer, text, tasks=["cwe"], lengths=[500])


# LongBench

ROW = {"context": "Long ago.", "input": "When?", "answers": ["Long ago", "once"], "all_classes": None, "_id": "one"}
TEMPLATES = {
    "qasper": "Read: {context}\nAsk: {input}",
    "trec": "{context}{input}",
    "multi_news": "{context}",
    "samsum": "{context}",
    "passage_retrieval_en": "{context}{input}",
}


@pytest.fixture
def prompts(tmp_path):
    return jsonl(tmp_path, "dataset2prompt.json", json.dumps(TEMPLATES))


def test_longbench_prompts(byte_tokenizer, tmp_path, prompts):
    files = [jsonl(tmp_path, "qasper.jsonl", ROW), jsonl(tmp_path, "samsum.jsonl", ROW)]
    (qasper, samsum), problems = longbench.examples(byte_tokenizer, files, prompts, context=500)
    assert not problems
    assert (qasper.id, qasper.group, qasper.max_new_tokens, qasper.stop) == ("qasper:one", "qasper", 128, ())
    assert decoded(byte_tokenizer, qasper) == "[Read: Long ago.\nAsk: When?]"
    assert decoded(byte_tokenizer, samsum) == "Long ago."  # few-shot tasks are no conversation
    assert samsum.stop == tuple(tokens_of(byte_tokenizer, "\n"))
    assert (samsum.min_new_tokens, qasper.min_new_tokens) == (1, 0)  # a line break at once would leave nothing to score
    assert samsum.score("\nLong ago\nmore") == pytest.approx(1)
    assert qasper.score("Long, ago!") == 1


@pytest.mark.parametrize(
    ("task", "context", "max_length", "left", "right"),
    [
        ("multi_news", 9999, 101, 49, 50),  # <s> is one of the first half
        ("multi_news", 1000, None, 242, 243),  # 1000 - 512 new ones leave 488, with the two brackets of the template
        ("multi_news", 1000, 8000, 242, 243),
        ("samsum", 500, None, 185, 186),  # 500 - 128, no template
    ],
)
def test_longbench_cuts_the_middle(byte_tokenizer, tmp_path, prompts, task, context, max_length, left, right):
    file = jsonl(tmp_path, f"{task}.jsonl", ROW | {"context": "a" * 300 + "b" * 300})
    (example,), _ = longbench.examples(byte_tokenizer, [file], prompts, context=context, max_length=max_length)
    assert decoded(byte_tokenizer, example).strip("[]") == "a" * left + "b" * right
    assert len(example.prompt) + example.max_new_tokens <= context


def test_longbench_prompts_that_grow_where_they_are_cut_still_fit(byte_tokenizer, tmp_path, prompts):
    """A character cut in two becomes a sign for what cannot be read, of three bytes."""
    file = jsonl(tmp_path, "multi_news.jsonl", ROW | {"context": "é" * 400})
    for context in range(620, 624):
        (example,), _ = longbench.examples(byte_tokenizer, [file], prompts, context=context)
        assert context - 8 < len(example.prompt) + 512 <= context


def test_longbench_needs_room(byte_tokenizer, tmp_path, prompts):
    files = [jsonl(tmp_path, "multi_news.jsonl", ROW)]
    for context, longest in ((500, None), (514, None), (9999, 1)):
        message = f"context={context} and max_length={longest} leave no room for the prompts of multi_news, beside 512"
        with pytest.raises(ValueError, match=message):
            longbench.examples(byte_tokenizer, files, prompts, context=context, max_length=longest)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        longbench.examples(byte_tokenizer, files, prompts, context=9999, max_length=0)


def test_longbench_e_has_groups_by_length(byte_tokenizer, tmp_path, prompts):
    rows = [ROW | {"length": length, "_id": length} for length in (3999, 4000, 7999, 8000)]
    file = jsonl(tmp_path, "qasper_e.jsonl", *rows, ROW)
    found, problems = longbench.examples(byte_tokenizer, [file], prompts, context=500)
    assert [each.group for each in found] == ["qasper_e 0-4k", "qasper_e 4-8k", "qasper_e 4-8k", "qasper_e 8k+"]
    assert shown(problems, tmp_path)[0].startswith("qasper_e.jsonl:5: no field 'length'")


def test_longbench_ids_are_unique(byte_tokenizer, tmp_path, prompts):
    rows = [ROW, ROW | {"_id": None}, {name: value for name, value in ROW.items() if name != "_id"}, ROW]
    found, problems = longbench.examples(byte_tokenizer, [jsonl(tmp_path, "qasper.jsonl", *rows)], prompts, context=500)
    assert [example.id for example in found] == ["qasper:one", "qasper:2", "qasper:3"]
    assert shown(problems, tmp_path) == ["qasper.jsonl:4: its id is 'qasper:one', as that of a line before"]


def test_longbench_names_bad_lines_and_keeps_the_rest(byte_tokenizer, tmp_path, prompts):
    rows = [
        ROW,
        {name: value for name, value in ROW.items() if name != "context"},
        ROW | {"answers": []},
        ROW | {"answers": "Long ago"},
        ROW | {"answers": ["", " "]},
        "{not json",
        [1, 2],
        "",
        ROW | {"_id": "two", "answers": ["", "Long ago"]},
        ROW | {"context": "\ud83d"},
        '{"context": ' + "[" * 100_000 + "]" * 100_000 + "}",
        ROW | {"answers": ["Long ago", 3]},
    ]
    file = jsonl(tmp_path, "qasper.jsonl", *rows)
    found, problems = longbench.examples(byte_tokenizer, [file], prompts, context=500)
    assert [example.id for example in found] == ["qasper:one", "qasper:two"]
    assert found[1].info["answers"] == ["Long ago"]
    assert [problem.partition(" (char")[0] for problem in shown(problems, tmp_path)] == [
        "qasper.jsonl:2: no field 'context'; it has ['_id', 'all_classes', 'answers', 'input']",
        "qasper.jsonl:3: field 'answers' is an empty list",
        "qasper.jsonl:4: field 'answers' is 'Long ago'; wanted list",
        "qasper.jsonl:5: field 'answers' holds '' and no other text; wanted some that is not empty",
        "qasper.jsonl:6: no JSON: Expecting property name enclosed in double quotes: line 1 column 2",
        "qasper.jsonl:7: a JSON list; wanted an object",
        "qasper.jsonl:10: half of a character, '\\ud83d', which no text may hold",
        "qasper.jsonl:11: JSON that is nested too deeply",
        "qasper.jsonl:12: field 'answers' holds 3; wanted text",
    ]


def test_longbench_names_bad_files_and_keeps_the_rest(byte_tokenizer, tmp_path, prompts):
    files = [
        jsonl(tmp_path, "samsum.jsonl", ROW | {"context": ""}, ROW),
        jsonl(tmp_path, "novel.jsonl", ROW),
        jsonl(tmp_path, "gov_report.jsonl", ROW),
        jsonl(tmp_path, "qasper.jsonl", ""),
        jsonl(tmp_path, "trec.jsonl", ROW | {"all_classes": ["Food", 3]}),
    ]
    found, problems = longbench.examples(byte_tokenizer, files, prompts, context=500)
    assert [example.id for example in found] == ["samsum:one"]
    assert [problem[:88] for problem in shown(problems, tmp_path)] == [
        "gov_report.jsonl: dataset2prompt.json has no prompt for gov_report",
        "novel.jsonl: no LongBench task; the name wants to be one of ['2wikimqa', 'dureader', 'go",
        "qasper.jsonl: no usable line",
        "samsum.jsonl:1: prompt='' is empty; wanted some text",
        "trec.jsonl: no usable line; the first problem is in line 1: field 'all_classes' holds 3;",
    ]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("novel.jsonl", ROW, "novel.jsonl: no LongBench task; the name wants to be one of"),
        ("gov_report.jsonl", ROW, "dataset2prompt.json has no prompt for gov_report"),
        ("trec.jsonl", ROW, "trec.jsonl: no usable line; .* line 1: field 'all_classes' is None; wanted list"),
        ("qasper.jsonl", "", "nothing to evaluate: .*qasper.jsonl: no usable line"),
        ("passage_retrieval_en.jsonl", ROW, "en.jsonl:1: answer='Long ago' names no paragraph"),
    ],
)
def test_longbench_without_any_use(byte_tokenizer, tmp_path, prompts, name, row, message):
    with pytest.raises(ValueError, match=message):
        longbench.examples(byte_tokenizer, [jsonl(tmp_path, name, row)], prompts, context=500)


def test_longbench_prompts_that_are_none(byte_tokenizer, tmp_path):
    file = jsonl(tmp_path, "qasper.jsonl", ROW)
    with pytest.raises(ValueError, match=r"prompts.json is no JSON"):
        longbench.examples(byte_tokenizer, [file], jsonl(tmp_path, "prompts.json", "{"), context=500)
    with pytest.raises(ValueError, match=r"prompts.json holds a list; wanted an object"):
        longbench.examples(byte_tokenizer, [file], jsonl(tmp_path, "prompts.json", [1]), context=500)
    for template, message in (
        ("{context} {question}", r"has a field \{question\}; wanted \{context\} and \{input\}"),
        ("{context} {}", r"has a field \{\}"),
        ("{context.x}", r"has a field \{context.x\}"),
        ("{context", r"is no template: expected '}'"),
        ("{context:d}", r"is no template: Unknown format code"),
    ):
        templates = jsonl(tmp_path, "prompts.json", {"qasper": template})
        with pytest.raises(ValueError, match=rf"prompts.json: the prompt for qasper {message}"):
            longbench.examples(byte_tokenizer, [file], templates, context=500)


def test_longbench_asks_for_jieba_before_any_work(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    prompts = jsonl(tmp_path, "dataset2prompt.json", {"dureader": "{context}", "passage_retrieval_zh": "{context}"})
    file = jsonl(tmp_path, "passage_retrieval_zh.jsonl", ROW | {"answers": ["段落7"]})
    assert len(longbench.examples(byte_tokenizer, [file], prompts, context=500)[0]) == 1  # numbers need no cutting
    with pytest.raises(ValueError, match="scoring Chinese needs the package jieba"):
        longbench.examples(byte_tokenizer, [jsonl(tmp_path, "dureader.jsonl", ROW)], prompts, context=500)


def test_longbench_tasks_come_from_the_hub_where_there_is_no_such_file(tmp_path, monkeypatch):
    asked = []

    def download(*args, **options):  # the hub itself is out of a test's reach
        asked.append((*args, *options.values()))
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            archive.writestr("data/qasper_e.jsonl", "{}")
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert longbench.locate(pathlib.Path("qasper_e")).read_text() == "{}"
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]
    (tmp_path / "qasper").write_text("of the user's")
    monkeypatch.chdir(tmp_path)
    for own in ("qasper", "qasper.jsonl", "novel"):
        assert longbench.locate(pathlib.Path(own)) == pathlib.Path(own)
    assert len(asked) == 1

    def fail(*args, **options):
        raise OSError("no way there")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ValueError, match="lcc is no file, and LongBench's own cannot be had from the hub: no way"):
        longbench.locate(pathlib.Path("lcc"))


def test_longbench_scores():
    assert longbench.score("trec", "\nFood\nDrink", ["Food"], ["Food", "Drink"]) == 1
    assert longbench.score("trec", "Food Drink", ["Food"], ["Food", "Drink"]) == 1 / 2
    assert longbench.score("qasper", "cat\nmore", ["dog", "cat"]) == pytest.approx(2 / 3)  # all lines count
    assert longbench.score("triviaqa", "cat\nmore", ["dog", "cat"]) == 1  # the first one counts
    assert longbench.score("passage_count", "2 or 3", ["3"]) == 1 / 2
    assert longbench.score("lcc", "x = 1\ny", ["x = 1"]) == 1


def test_longbench_asks_and_scores_as_published():
    """After dataset2metric, dataset2maxlen.json and the lists of names in THUDM/LongBench's pred.py and eval.py."""
    found = {name: (task.metric, task.max_new_tokens) for name, task in longbench.DATASETS.items()}
    assert found == {
        "narrativeqa": ("qa_f1", 128),
        "qasper": ("qa_f1", 128),
        "multifieldqa_en": ("qa_f1", 64),
        "multifieldqa_zh": ("qa_f1_zh", 64),
        "hotpotqa": ("qa_f1", 32),
        "2wikimqa": ("qa_f1", 32),
        "musique": ("qa_f1", 32),
        "dureader": ("rouge_l_zh", 128),
        "gov_report": ("rouge_l", 512),
        "qmsum": ("rouge_l", 512),
        "multi_news": ("rouge_l", 512),
        "vcsum": ("rouge_l_zh", 512),
        "trec": ("classification", 64),
        "triviaqa": ("qa_f1", 32),
        "samsum": ("rouge_l", 128),
        "lsht": ("classification", 64),
        "passage_count": ("count", 32),
        "passage_retrieval_en": ("retrieval", 32),
        "passage_retrieval_zh": ("retrieval", 32),
        "lcc": ("code_similarity", 64),
        "repobench-p": ("code_similarity", 64),
    }
    tasks = longbench.DATASETS.items()
    few_shot = {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name, task in tasks if not task.chat} == few_shot | {"lcc", "repobench-p"}
    assert {name for name, task in tasks if task.first_line} == few_shot
    assert {name for name, task in tasks if task.line_ends} == {"samsum"}
    for name in ("qa_f1", "qa_f1_zh", "rouge_l", "rouge_l_zh", "retrieval", "count", "code_similarity"):
        assert longbench.METRICS[name] is getattr(metrics, name)


# multiple choice


def test_choices(byte_tokenizer, tmp_path):
    row = {"context": "c" * 500, "question": "Which?", "choices": ["one", "three"], "answer": 1}
    bad = [row | {"answer": 2}, row | {"choices": []}, row | {"choices": ["a", 3]}, row | {"answer": "1"}]
    bad += [row | {"choices": ["a", ""]}, row | {"answer": True}, row | {"question": "Why" * 25 + "?"}]
    file = jsonl(tmp_path, "law.jsonl", row, *bad)
    found, problems = choice.examples(byte_tokenizer, [file], context=100)
    assert shown(problems, tmp_path) == [
        "law.jsonl:2: field 'answer' is 2; wanted 0 .. 1, an index into 'choices'",
        "law.jsonl:3: field 'choices' is an empty list",
        "law.jsonl:4: field 'choices' holds 3; wanted text",
        "law.jsonl:5: field 'answer' is '1'; wanted int",
        "law.jsonl:6: field 'choices' holds ''; wanted text",
        "law.jsonl:7: field 'answer' is True; wanted int",
        "law.jsonl:8: context=100 leaves no room for the document beside 103 tokens of question and choice",
    ]
    assert [byte_tokenizer.decode(example.gold) for example in found] == [" one", " three"]
    assert all(len(example.prompt) + len(example.gold) <= 100 for example in found)
    assert decoded(byte_tokenizer, found[0]).endswith("c\n\nQuestion: Which?\nAnswer:")
    records = [
        {"id": example.id, "group": example.group, **example.info, "scores": {"loss": loss}}
        for example, loss in zip(found, (2.0, 1.5), strict=True)
    ]
    assert [record["scores"]["accuracy"] for record in choice.accuracy(records)] == [1.0]
    records[0]["scores"]["loss"] = 1.0
    assert [record["scores"]["accuracy"] for record in choice.accuracy(records)] == [0.0]
    assert choice.accuracy(records[:1]) == []
    novel = jsonl(tmp_path, "novel.jsonl", "Once upon a time.")
    assert [len(part) for part in choice.examples(byte_tokenizer, [novel, file], context=100)] == [2, 8]
    none = jsonl(tmp_path, "none.jsonl", row | {"answer": 2})
    with pytest.raises(
        ValueError, match=r"nothing to evaluate: .*none.jsonl:1: field 'answer' is 2; .*novel.jsonl: no"
    ):
        choice.examples(byte_tokenizer, [novel, none], context=100)


# files


def test_texts_that_are_none(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"text.txt is not UTF-8 text"):
        read_text(file)
    file.write_text(" \n")
    with pytest.raises(ValueError, match=r"text.txt is empty; wanted text"):
        read_text(file)
    file.write_bytes(b'\xff{"a": 1}\n{"a": 1}\n')
    rows, problems = read_rows(file, {"a": int})
    assert rows == [(2, {"a": 1})]
    assert str(problems[0]).startswith(f"{file}:1: no JSON: ")


def test_first_tokens(byte_tokenizer):
    assert first_tokens(byte_tokenizer) == [256]


# the command line


def test_flags_of_ruler():
    parser = argparse.ArgumentParser()
    for flag, settings in TASKS["ruler"].options.items():
        parser.add_argument(flag, **settings)
    assert parser.parse_args(["--tasks", "vt", "qa_1"]).tasks == ["vt", "qa_1"]
    assert parser.parse_args([]).tasks == []
    with pytest.raises(SystemExit):
        parser.parse_args(["--tasks", "niah"])
    assert "prompt and answer together" in parser.format_help()
