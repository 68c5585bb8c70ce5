"""What the evaluations ask, and what they say of bad data."""

import json
import re

import numpy as np
import pytest

from mustafar_jax.quality import choice, longbench, needle, perplexity, ruler
from mustafar_jax.quality.examples import first_tokens, read_rows, read_text, tokens_of

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
        assert fact.start() / question.start() == pytest.approx(example.info["depth"], abs=0.25)
        before = prompt[: fact.start()].rpartition(" The ")[0]
        assert before == "" or before.endswith(".") or example.info["depth"] == 1
    assert len({example.info["answer"] for example in found}) > 15


def test_needles_need_room(byte_tokenizer, text):
    with pytest.raises(ValueError, match="length=50 leaves no room for text beside"):
        needle.needles(byte_tokenizer, text, lengths=[50])
    with pytest.raises(ValueError, match=r"has \d+ tokens; a haystack of 99999 needs as many"):
        needle.needles(byte_tokenizer, text, lengths=[99999])


# RULER


@pytest.fixture
def question_files(tmp_path):
    rows = [
        {
            "question": f"Who is {i}?",
            "answers": [f"name {i}", "x"],
            "documents": [f"Person {i} is name {i}." + " Much else is told of them." * 3],
        }
        for i in range(40)
    ]
    return [jsonl(tmp_path, "squad.jsonl", *rows), jsonl(tmp_path, "hotpot.jsonl", *rows, '{"question": "?"}')]


def test_ruler_makes_thirteen_tasks_that_can_be_answered(byte_tokenizer, text, question_files):
    found, problems = ruler.examples(byte_tokenizer, text, questions=question_files, lengths=[3000], samples=2)
    assert [str(problem) for problem in problems] == ["hotpot.jsonl:41: no field 'answers'; it has ['question']"]
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
    needles = {name: len(re.findall(r"The secret \w+ of \S+ is \S+\.", prompt)) for name, prompt in prompts.items()}
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
    written = prompts["fwe"].partition("\n\nQuestion")[0].split("\n\n")[1].split()
    assert sorted(answers["fwe"], key=written.count, reverse=True) == answers["fwe"]
    assert written.count(answers["fwe"][2]) >= max(written.count(w) for w in set(written) - set(answers["fwe"]))


def test_ruler_is_the_same_again_and_asks_for_its_files(byte_tokenizer, text, question_files):
    make = {"lengths": [2000], "samples": 1}
    first, second = (ruler.examples(byte_tokenizer, text, tasks=["fwe", "vt"], **make)[0] for _ in range(2))
    alone = ruler.examples(byte_tokenizer, text, tasks=["vt"], **make)[0]
    for a, b in zip([*first, first[1]], [*second, *alone], strict=True):
        np.testing.assert_array_equal(a.prompt, b.prompt)
    assert len(ruler.examples(byte_tokenizer, text, questions=question_files[:1], **make)[0]) == 12
    with pytest.raises(ValueError, match="qa_2 needs 2 question files; got 1"):
        ruler.examples(byte_tokenizer, text, tasks=["qa_2"], questions=question_files[:1])
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
    files = [jsonl(tmp_path, "qasper_e.jsonl", ROW), jsonl(tmp_path, "samsum.jsonl", ROW)]
    (qasper, samsum), problems = longbench.examples(byte_tokenizer, files, prompts, context=500)
    assert not problems
    assert (qasper.id, qasper.group, qasper.max_new_tokens, qasper.stop) == ("qasper_e:one", "qasper_e", 128, ())
    assert decoded(byte_tokenizer, qasper) == "[Read: Long ago.\nAsk: When?]"
    assert decoded(byte_tokenizer, samsum) == "Long ago."  # few-shot tasks are no conversation
    assert samsum.stop == tuple(tokens_of(byte_tokenizer, "\n"))
    assert samsum.score("\nLong ago\nmore") == pytest.approx(1)
    assert qasper.score("Long, ago!") == 1


def test_longbench_cuts_the_middle(byte_tokenizer, tmp_path, prompts):
    long = ROW | {"context": "a" * 300 + "b" * 300}
    file = jsonl(tmp_path, "multi_news.jsonl", long)
    (example,), _ = longbench.examples(byte_tokenizer, [file], prompts, context=9999, max_length=101)
    assert decoded(byte_tokenizer, example) == "[" + "a" * 50 + "b" * 50 + "]"
    (example,), _ = longbench.examples(byte_tokenizer, [file], prompts, context=1000)
    assert len(example.prompt) + example.max_new_tokens <= 1000


def test_longbench_names_bad_lines_and_keeps_the_rest(byte_tokenizer, tmp_path, prompts):
    rows = [
        ROW,
        {name: value for name, value in ROW.items() if name != "context"},
        ROW | {"answers": []},
        ROW | {"answers": "Long ago"},
        ROW | {"answers": [""]},
        "{not json",
        [1, 2],
        "",
        ROW | {"_id": "two"},
    ]
    file = jsonl(tmp_path, "qasper.jsonl", *rows)
    found, problems = longbench.examples(byte_tokenizer, [file], prompts, context=500)
    assert [example.id for example in found] == ["qasper:one", "qasper:two"]
    assert [str(problem).partition(" (char")[0] for problem in problems] == [
        "qasper.jsonl:2: no field 'context'; it has ['_id', 'all_classes', 'answers', 'input']",
        "qasper.jsonl:3: field 'answers' is an empty list",
        "qasper.jsonl:4: field 'answers' is 'Long ago'; wanted list",
        "qasper.jsonl:6: no JSON: Expecting property name enclosed in double quotes: line 1 column 2",
        "qasper.jsonl:7: a JSON list; wanted an object",
        "qasper.jsonl:5: field 'answers' holds ''; wanted text",
    ]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("novel.jsonl", ROW, "novel.jsonl is no LongBench task; the name wants to be one of"),
        ("gov_report.jsonl", ROW, "dataset2prompt.json has no prompt for gov_report"),
        ("trec.jsonl", ROW, "trec.jsonl:1: field 'all_classes' is None; wanted list"),
        ("qasper.jsonl", "", "qasper.jsonl holds no usable line"),
        ("passage_retrieval_en.jsonl", ROW, "no usable line in .*:1: answer='Long ago' names no paragraph"),
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


def test_longbench_scores():
    assert longbench.score("trec", "\nFood\nDrink", ["Food"], ["Food", "Drink"]) == 1
    assert longbench.score("trec", "Food Drink", ["Food"], ["Food", "Drink"]) == 1 / 2
    assert longbench.score("qasper", "cat\nmore", ["dog", "cat"]) == pytest.approx(2 / 3)  # all lines count
    assert longbench.score("triviaqa", "cat\nmore", ["dog", "cat"]) == 1  # the first one counts
    assert longbench.score("passage_count", "2 or 3", ["3"]) == 1 / 2
    assert longbench.score("lcc", "x = 1\ny", ["x = 1"]) == 1
    for name, dataset in longbench.DATASETS.items():
        assert dataset.metric in {*longbench.METRICS, "classification"}, name


# multiple choice


def test_choices(byte_tokenizer, tmp_path):
    row = {"context": "c" * 500, "question": "Which?", "choices": ["one", "three"], "answer": 1}
    bad = [row | {"answer": 2}, row | {"choices": []}, row | {"choices": ["a", 3]}, row | {"answer": "1"}]
    file = jsonl(tmp_path, "law.jsonl", row, *bad)
    found, problems = choice.examples(byte_tokenizer, [file], context=100)
    assert [str(problem) for problem in problems] == [
        "law.jsonl:3: field 'choices' is an empty list",
        "law.jsonl:5: field 'answer' is '1'; wanted int",
        "law.jsonl:2: field 'answer' is 2; wanted 0 .. 1, an index into 'choices'",
        "law.jsonl:4: field 'choices' holds 3; wanted text",
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
    assert str(problems[0]).startswith("text.txt:1: no JSON: ")


def test_first_tokens(byte_tokenizer):
    assert first_tokens(byte_tokenizer) == [256]
