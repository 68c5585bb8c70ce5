"""Scores of written answers, and means with error bars.

The LongBench metrics (arXiv 2308.14508, section 3 and its published evaluation) are written from their definitions. All
take what the model wrote and one right answer, and give 0 .. 1.
"""

import collections
import difflib
import re
import string
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Words = Sequence[str]


def bootstrap(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """The mean with its 95 % interval, by drawing as many values again with replacement.

    Returns:
        {"mean", "low", "high", "n"}; low and high are the mean where there is one value only.

    Raises:
        ValueError: no value.
    """
    return bootstrap_groups([values], draws=draws, seed=seed)


def bootstrap_groups(groups: Sequence[Sequence[float]], *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """The mean of the groups' means with its 95 % interval, by drawing as many values of each group again.

    RULER's and LongBench's averages over tasks are such means: a task counts once, however many examples it has.

    Returns:
        {"mean", "low", "high", "n"}, n of all groups together.

    Raises:
        ValueError: no group, or one without a value.
    """
    if not groups or not all(map(len, groups)):
        raise ValueError(f"{groups=} has no mean; wanted at least one value in each group")
    rng = np.random.default_rng(seed)
    given = [np.asarray(group, np.float64) for group in groups]
    drawn = [group[rng.integers(0, len(group), (draws, len(group)))].mean(axis=1) for group in given]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    mean = float(np.mean([group.mean() for group in given]))
    return {"mean": mean, "low": float(low), "high": float(high), "n": sum(map(len, given))}


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words, as multisets, in lower case without punctuation and articles."""
    return _f1(_plain_words(prediction), _plain_words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """`qa_f1` for Chinese: words as `jieba` cuts them, without the punctuation that LongBench's metrics.py lists."""
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L at summary level, on the sets of words: the F1 of the union of longest common subsequences.

    A sentence ends at a full stop. For each pair of a sentence of the answer and one of the prediction, the words of a
    longest common subsequence count, every word once; precision and recall are taken over the texts' different words.
    """
    predicted, expected = _sentences(prediction), _sentences(answer)
    words, gold = {w for s in predicted for w in s}, {w for s in expected for w in s}
    if not words or not gold:
        return 0.0
    common = {word for right in expected for left in predicted for word in _common_subsequence(right, left)}
    precision, recall = len(common) / len(words), len(common) / len(gold)
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(prediction: str, answer: str) -> float:
    """`rouge_l` for Chinese: words as `jieba` cuts them."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, classes: Iterable[str]) -> float:
    """1 / n where the right class is among the n that the prediction names, else 0.

    A name that is part of the right one does not count as named.
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the paragraph's in "Paragraph 7"; also in Chinese."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    if found is None:
        raise ValueError(f"{answer=} names no paragraph, as 'Paragraph 7' does")
    return count(prediction, found[1])


def count(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """How alike the first line of code and the right one are: twice the matching characters over all, in hundredths.

    Lines with a backtick, a # or a // are taken for comments or markup.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


def found_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand in the prediction, upper or lower case (RULER)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def found_any(prediction: str, answers: Sequence[str]) -> float:
    """1 where any of the answers stands in the prediction, upper or lower case (RULER's question answering)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def best_of(metric: Callable[[str, str], float], prediction: str, answers: Iterable[str]) -> float:
    """The score against the answer that fits best."""
    return max(metric(prediction, answer) for answer in answers)


def chinese_cutter() -> Callable[[str], list[str]]:
    """What cuts Chinese into words; ValueError where it is not installed."""
    try:
        import jieba
    except ImportError as error:
        raise ValueError("scoring Chinese needs the package jieba, which cuts it into words") from error
    return lambda text: list(jieba.cut(text, cut_all=False))


def _f1(predicted: Words, expected: Words) -> float:
    common = (collections.Counter(predicted) & collections.Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def _plain_words(text: str) -> Words:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _sentences(text: str) -> list[Words]:
    # A sentence of blanks is one empty word, as in the published evaluation: most answers end with ".\n".
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(a: Words, b: Words) -> list[str]:
    """A longest common subsequence; of several, that which takes from the end of `a` and drops from the end of `b`."""
    table = np.zeros((len(a) + 1, len(b) + 1), np.int32)
    index = {word: i for i, word in enumerate(dict.fromkeys([*a, *b]))}
    right = np.array([index[word] for word in b], np.int64)
    for i, word in enumerate(a, 1):
        # Longest so far, whether or not this word is used; then along the row, by a running maximum.
        used = np.where(right == index[word], table[i - 1, :-1] + 1, 0)
        table[i, 1:] = np.maximum.accumulate(np.maximum(used, table[i - 1, 1:]))
    i, j, common = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            common.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def _chinese_words(text: str) -> Words:
    bare = ("".join(char for char in word.lower() if not _is_dropped(char)) for word in _cut(text))
    return [word for word in bare if word]


# Beside ASCII's, as code points, first to last: general punctuation; CJK punctuation; a wavy underline; fullwidth and
# halfwidth forms. Not all that Unicode calls punctuation: the opening brackets U+3008 and U+300A are kept, for one.
_CHINESE_PUNCTUATION = [
    *[(0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027)],
    *[(0x3001, 0x3003), (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F)],
    *[(0xFE4F, 0xFE4F)],
    *[(0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)],
]


def _is_dropped(char: str) -> bool:
    listed = any(first <= ord(char) <= last for first, last in _CHINESE_PUNCTUATION)
    return char.isspace() or char in string.punctuation or listed


def _cut(text: str) -> list[str]:
    return chinese_cutter()(text)
