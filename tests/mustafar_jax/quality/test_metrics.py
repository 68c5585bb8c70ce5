"""Every metric against cases worked out by hand."""

import sys
import types

import numpy as np
import pytest

from mustafar_jax.quality import metrics


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat sat!", "a cat", 2 / 3),  # cat, sat against cat: precision 1/2, recall 1
        ("cat cat dog", "cat cat cat", 2 / 3),  # two of three both ways
        ("U.S.A.", "usa", 1),
        ("theatre", "the theatre", 1),  # an article is a word, not the beginning of one
        ("nothing", "cat", 0),
        ("", "cat", 0),
    ],
)
def test_qa_f1(prediction, answer, expected):
    assert metrics.qa_f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 4 / 5),  # the, cat, on, mat of five different words each
        ("b a", "a b", 1 / 2),  # one word is in order
        ("cat.\n", "cat", 2 / 3),  # the blank behind the stop is a word to the published evaluation
        # Each sentence of the answer shares a word with each of the prediction; as one sentence they would give 3/4.
        ("a b. c d", "a c. b d", 1),
        # The union over two sentences is w1 w2 w3 w5: recall 4/5, precision 4/8.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 13),
        ("one two", "three", 0),
        ("", "three", 0),
        (".", "three", 0),
        ("One", "one", 0),  # upper case matters
    ],
)
def test_rouge_l(prediction, answer, expected):
    assert metrics.rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-7)


def test_common_subsequence_is_a_longest_one():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (["abcd"[i] for i in rng.integers(0, 4, rng.integers(0, 9))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        common = metrics._common_subsequence(a, b)
        assert len(common) == table[-1][-1]
        for words in (a, b):
            rest = iter(words)
            assert all(word in rest for word in common)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Type: Food", 1),
        ("Food or Drink", 1 / 2),
        ("Fo", 0),  # part of the right name: neither right nor another class
        ("Fo Food", 1),
        ("Drink", 0),
        ("", 0),
    ],
)
def test_classification(prediction, expected):
    assert metrics.classification(prediction, "Food", ["Food", "Drink", "Fo"]) == expected


def test_numbers():
    assert metrics.retrieval("Paragraph 3 or 7", "Paragraph 7") == 1 / 2
    assert metrics.retrieval("段落7", "段落7") == 1
    assert metrics.retrieval("none", "Paragraph 7") == 0
    assert metrics.count("There are 5, not 6 or 5", "5") == 2 / 3
    assert metrics.count("55", "5") == 0
    with pytest.raises(ValueError, match="answer='seven' names no paragraph"):
        metrics.retrieval("7", "seven")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("\n\nx = 12\nmore", 1),
        ("# comment\n```\nx = 1\n", 0.91),  # 2 * 5 / (5 + 6)
        ("// only\n# comments", 0),
    ],
)
def test_code_similarity(prediction, expected):
    assert metrics.code_similarity(prediction, "x = 12") == pytest.approx(expected)


def test_found():
    assert metrics.found_all("It is 12 and ABC.", ["12", "abc", "99", "7"]) == 1 / 2
    assert metrics.found_any("It is ABC.", ["99", "abc"]) == 1
    assert metrics.found_any("It is ABC.", ["99"]) == 0
    assert metrics.best_of(metrics.qa_f1, "cat", ["dog", "cat dog", "bird"]) == pytest.approx(2 / 3)


@pytest.fixture
def cut_by_character(monkeypatch):
    """In place of the package jieba, which the tests do without."""
    jieba = types.SimpleNamespace(cut=lambda text, cut_all: iter(text))
    monkeypatch.setitem(sys.modules, "jieba", jieba)
    return jieba


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("猫，狗", "猫。", 2 / 3),  # the comma and the full stop are dropped
        ("《猫》", "猫", 2 / 3),  # the published list has the closing bracket only
        ("A猫 ", "a猫", 1),
        ("鸟", "猫", 0),
        ("，", "猫", 0),
    ],
)
def test_qa_f1_zh(cut_by_character, prediction, answer, expected):
    assert metrics.qa_f1_zh(prediction, answer) == pytest.approx(expected)


def test_chinese_punctuation_is_that_of_longbench(cut_by_character):
    assert (
        metrics.qa_f1_zh(
            "猫!？｡。＂＃＄％（）＊＋，－／：；＜＝＞＠［］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
            "猫",
        )
        == 1
    )
    for char in "《〈〉·・﹃﹄§※¿•．":
        assert metrics.qa_f1_zh(f"猫{char}", "猫") == pytest.approx(2 / 3), char


def test_blanks_within_a_chinese_word_are_dropped(cut_by_character):
    cut_by_character.cut = lambda text, cut_all: text.split("|")
    assert metrics.qa_f1_zh("新 闻|猫", "新闻|猫") == 1


def test_rouge_l_zh(cut_by_character):
    assert metrics.rouge_l_zh("猫狗", "猫鸟") == pytest.approx(1 / 2)


def test_chinese_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    for metric in (metrics.qa_f1_zh, metrics.rouge_l_zh):
        with pytest.raises(ValueError, match="scoring Chinese needs the package jieba"):
            metric("猫", "猫")


def test_bootstrap():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = metrics.bootstrap(values.tolist())
    assert found["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.03)
    assert metrics.bootstrap([2.0]) == {"mean": 2, "low": 2, "high": 2, "n": 1}
    with pytest.raises(ValueError, match="has no mean"):
        metrics.bootstrap([])


def test_bootstrap_of_groups():
    rng = np.random.default_rng(0)
    groups = [rng.normal(0, 1, 100).tolist(), rng.normal(6, 3, 900).tolist()]
    found = metrics.bootstrap_groups(groups)
    assert found["mean"] == pytest.approx((np.mean(groups[0]) + np.mean(groups[1])) / 2)
    assert found["n"] == 1000
    half = 1.96 * np.sqrt(1 / 100 + 9 / 900) / 2  # each group is drawn from on its own
    assert found["low"] == pytest.approx(found["mean"] - half, abs=0.03)
    assert found["high"] == pytest.approx(found["mean"] + half, abs=0.03)
    with pytest.raises(ValueError, match="at least one value in each group"):
        metrics.bootstrap_groups([[1.0], []])
