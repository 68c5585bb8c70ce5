"""RULER's thirteen tasks (arXiv 2404.06654, section 3), from generators of our own after the paper's description.

Eight needle tasks differ in what hides the needles, in their keys and values, and in how many there are; one traces
variables that are assigned to each other; two ask for the commonest words of a list; two are questions whose documents
lie among others. Scores are RULER's: the share of the answers found in what the model writes; for questions, whether
any is found. Prompts show no worked example, and words are made of syllables.

Two sources are the user's: a text that hides needles (essays there), and for the questions JSON Lines files with
{"question": ..., "answers": [...], "documents": [...]}: a row's documents are put among those of the other rows.
"""

import dataclasses
import functools
import pathlib
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mustafar_jax.quality import metrics
from mustafar_jax.quality.examples import Example, Problem, first_tokens, read_rows, read_text, tokens_of
from mustafar_jax.quality.needle import FILLER, insert

Tokens = list[int]


class Parts(NamedTuple):
    """A prompt before it has its length: what stands before and after the text that fills it, and the answers.

    Attributes:
        head, tail: of the prompt; the tail begins the answer.
        answers: to be found in what the model writes.
        fill: room in tokens -> the text's tokens.
    """

    head: str
    tail: str
    answers: list[str]
    fill: Callable[[int], Tokens]


@dataclasses.dataclass(frozen=True)
class Source:
    """What tasks are made of: random numbers, the tokenizer, the text that hides needles, and rows of questions."""

    rng: np.random.Generator
    tokenizer: Any
    text: Tokens
    rows: Sequence[dict[str, Any]] = ()

    def tokens(self, text: str) -> Tokens:
        """A text's tokens."""
        return tokens_of(self.tokenizer, text)

    def words(self, count: int) -> list[str]:
        """Different words of three syllables."""
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(_SYLLABLES[i] for i in self.rng.integers(len(_SYLLABLES), size=3))] = None
        return list(found)

    def number(self) -> str:
        """Seven digits."""
        return str(self.rng.integers(10**6, 10**7))

    def uuid(self) -> str:
        """A random UUID."""
        return str(uuid.UUID(bytes=self.rng.bytes(16), version=4))

    def stretch(self, room: int) -> Tokens:
        """Consecutive tokens of the text."""
        start = self.rng.integers(max(1, len(self.text) - room + 1))
        return self.text[start : start + room]

    def most(self, build: Callable[[int], str], room: int) -> Tokens:
        """The tokens of build(n) for the largest n with which there is room; build(n + 1) is longer than build(n)."""
        low, high = 0, 1
        while len(self.tokens(build(high))) <= room:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if len(self.tokens(build(middle))) <= room else (low, middle)
        if low == 0:
            raise ValueError(f"there is no room for a text in {room} tokens")
        return self.tokens(build(low))


_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclasses.dataclass(frozen=True)
class Needles:
    """A retrieval task.

    Attributes:
        hay: what hides the needles: "noise" (a few sentences, repeated), "text", or "needles" of other keys.
        key, value: what they are: "word", "number" or "uuid".
        keys: needles of different keys in the text, at least.
        values: needles of each key that is asked for.
        asked: keys that are asked for.
    """

    hay: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, source: Source) -> Parts:
        """One example."""
        keys = self._keys(source, max(self.keys, self.asked))
        asked, others = keys[: self.asked], keys[self.asked :]
        pairs = [(key, self._value(source)) for key in asked for _ in range(self.values)]
        distraction = [(key, self._value(source)) for key in others]
        names = " and ".join(asked)
        plural = "s" if len(pairs) > 1 else ""
        return Parts(
            f"Secret {self.value}s are hidden in the following text. Remember them.\n\n",
            f"\n\nQuestion: What are all the secret {self.value}s of {names} in the text?\n"
            f"Answer: The secret {self.value}{plural} of {names} in the text:",
            [value for _, value in pairs],
            functools.partial(self._fill, source, [self._needle(*pair) for pair in pairs + distraction]),
        )

    def _fill(self, source: Source, needles: list[str], room: int) -> Tokens:
        if self.hay == "needles":
            place = source.rng.random(len(needles))

            def build(count: int) -> str:
                rng = np.random.default_rng(count)
                made = dataclasses.replace(source, rng=rng)
                lines = [self._needle(key, self._value(made)) for key in self._keys(made, count)]
                for where, needle in zip(place, needles, strict=True):
                    lines.insert(int(where * len(lines)), needle)
                return "".join(lines)

            return source.most(build, room)
        pieces = [(float(source.rng.random()), source.tokens(needle)) for needle in needles]
        room -= sum(len(tokens) for _, tokens in pieces)
        return insert(source.tokenizer, source.stretch(room) if self.hay == "text" else _noise(source, room), pieces)

    def _needle(self, key: str, value: str) -> str:
        return f" The secret {self.value} of {key} is {value}."

    def _keys(self, source: Source, count: int) -> list[str]:
        return source.words(count) if self.key == "word" else [source.uuid() for _ in range(count)]

    def _value(self, source: Source) -> str:
        return source.number() if self.value == "number" else source.uuid()


def variables(source: Source, *, hops: int = 4) -> Parts:
    """Tracing: a number is given to one variable, and from one to the next; which variables hold it?"""
    names = [name.upper() for name in source.words(hops + 1)]
    number = str(source.rng.integers(10**4, 10**5))
    given = [
        f" VAR {name} = {value}." for name, value in zip(names, [number, *(f"VAR {n}" for n in names)], strict=False)
    ]

    def fill(room: int) -> Tokens:
        lines = [source.tokens(line) for line in given]
        depths = np.sort(source.rng.random(len(lines)))
        hay = _noise(source, room - sum(map(len, lines)))
        return insert(source.tokenizer, hay, list(zip(depths.tolist(), lines, strict=True)))

    return Parts(
        "Variables are assigned in the following text. Remember which holds what.\n\n",
        f"\n\nQuestion: Which variables hold the value {number}, directly or through others?\n"
        f"Answer: The {len(names)} variables that hold the value {number}:",
        names,
        fill,
    )


def common_words(source: Source, *, common: int = 10, often: tuple[int, ...] = (30, 10), seldom: int = 3) -> Parts:
    """Aggregation: the words that stand in a list most often; all others stand in it seldom, and equally so.

    How often the common ones stand in it is the first of `often` that there is room for.
    """
    frequent = source.words(common)
    seed = int(source.rng.integers(2**32))

    def build(times: int, count: int) -> str:
        rng = np.random.default_rng(seed)
        rare = [word for word in dataclasses.replace(source, rng=rng).words(count + common) if word not in frequent]
        listed = frequent * times + rare[:count] * seldom
        order = rng.permutation(len(listed))
        return " ".join(f"{index}. {listed[i]}" for index, i in enumerate(order, 1))

    def fill(room: int) -> Tokens:
        fitting = (times for times in often if len(source.tokens(build(times, 1))) <= room)
        return source.most(functools.partial(build, next(fitting, often[-1])), room)

    return Parts(
        "Some words stand in the following list more often than others. Remember which.\n\n",
        f"\n\nQuestion: Which {common} words stand in the list most often?\n"
        f"Answer: The {common} words that stand in the list most often:",
        frequent,
        fill,
    )


def frequent_words(source: Source, *, alpha: float = 2.0, asked: int = 3) -> Parts:
    """Aggregation: the three commonest words, where the k-th commonest is drawn with probability ~ 1 / k**alpha."""
    words = source.words(200)
    seed = int(source.rng.integers(2**32))
    share = 1 / np.arange(1, len(words) + 1) ** alpha
    # Drawn once, and cut to the room there is, so that a longer text continues a shorter one.
    drawn = np.random.default_rng(seed).choice(len(words), 200_000, p=share / share.sum())

    def build(count: int) -> str:
        return " ".join(words[i] for i in drawn[:count])

    def fill(room: int) -> Tokens:
        tokens = source.most(build, room)
        counts = Counter(source.tokenizer.decode(tokens).split()).most_common(asked)
        answers[:] = [word for word, _ in counts]
        return tokens

    answers: list[str] = []
    return Parts(
        "Read the following text of made-up words and remember how often each stands in it.\n\n",
        f"\n\nQuestion: Which {asked} words stand in the text most often?\n"
        f"Answer: The {asked} words that stand in the text most often:",
        answers,
        fill,
    )


def questions(source: Source) -> Parts:
    """Question answering: a row's documents, among as many of other rows as there is room for."""
    row = source.rows[int(source.rng.integers(len(source.rows)))]
    others = [document for other in source.rows if other is not row for document in other["documents"]]
    others = [others[i] for i in source.rng.permutation(len(others)) if others[i] not in row["documents"]]
    order = source.rng.random(len(others) + len(row["documents"]))

    def build(count: int) -> str:
        chosen = row["documents"] + others[:count]
        shuffled = [chosen[i] for i in np.argsort(order[: len(chosen)])]
        return "\n\n".join(f"Document {index}:\n{document}" for index, document in enumerate(shuffled, 1))

    def fill(room: int) -> Tokens:
        whole = source.tokens(build(len(others)))
        return whole if len(whole) <= room else source.most(build, room)

    return Parts(
        "Answer the question from the following documents, in a few words.\n\n",
        f"\n\nQuestion: {row['question']}\nAnswer:",
        row["answers"],
        fill,
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the thirteen: how an example is made, and how many tokens the answer may take."""

    make: Callable[[Source], Parts]
    max_new_tokens: int


TASKS = {
    "niah_single_1": Task(Needles("noise"), 128),
    "niah_single_2": Task(Needles("text"), 128),
    "niah_single_3": Task(Needles("text", value="uuid"), 128),
    "niah_multikey_1": Task(Needles("text", keys=4), 128),
    "niah_multikey_2": Task(Needles("needles"), 128),
    "niah_multikey_3": Task(Needles("needles", key="uuid", value="uuid"), 128),
    "niah_multivalue": Task(Needles("text", values=4), 128),
    "niah_multiquery": Task(Needles("text", keys=4, asked=4), 128),
    "vt": Task(variables, 30),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, 50),
    "qa_1": Task(questions, 32),
    "qa_2": Task(questions, 32),
}
"""With the sizes that the paper's thirteen have."""


def examples(
    tokenizer: Any,
    text: pathlib.Path,
    *,
    tasks: Sequence[str] = (),
    questions: Sequence[pathlib.Path] = (),
    lengths: Sequence[int] = (4096,),
    samples: int = 10,
    seed: int = 0,
) -> tuple[list[Example], list[Problem]]:
    """Examples of the tasks at each length, and the lines of question files that are left out.

    Args:
        tokenizer: the model's.
        text: UTF-8, hides needles.
        tasks: names in `TASKS`; if empty, all that there are files for.
        questions: JSON Lines files of qa_1 and qa_2.
        lengths: tokens of prompt and answer together, at most.
        samples: examples of each task at each length.
        seed: of all that is random; a task's examples do not depend on which others are made.

    Raises:
        ValueError: an unknown task, one without its file, a text or a length too short.
    """
    rows, problems = [], []
    for file in questions:
        found, bad = read_rows(file, {"question": str, "answers": list, "documents": list})
        rows.append([row for _, row in found])
        problems += bad
    names = tasks or [name for name in TASKS if not name.startswith("qa_") or int(name[3:]) <= len(rows)]
    hay = tokens_of(tokenizer, read_text(text))
    made = []
    for name in names:
        if name not in TASKS:
            raise ValueError(f"task {name!r} is none of {sorted(TASKS)}")
        if name.startswith("qa_") and int(name[3:]) > len(rows):
            raise ValueError(f"{name} needs {int(name[3:])} question files; got {len(rows)}")
        own = rows[int(name[3:]) - 1] if name.startswith("qa_") else ()
        for length in lengths:
            for sample in range(samples):
                rng = np.random.default_rng([seed, list(TASKS).index(name), length, sample])
                made.append(_example(name, length, sample, Source(rng, tokenizer, hay, own)))
    return made, problems


def _example(name: str, length: int, sample: int, source: Source) -> Example:
    parts, count = TASKS[name].make(source), TASKS[name].max_new_tokens
    head, tail = [*first_tokens(source.tokenizer), *source.tokens(parts.head)], source.tokens(parts.tail)
    room = length - count - len(head) - len(tail)
    if room < 1:
        raise ValueError(f"{length=} leaves no room for {name}, which needs {length - room} tokens beside its text")
    prompt = np.asarray([*head, *parts.fill(room), *tail], np.int32)
    metric = metrics.found_any if name.startswith("qa_") else metrics.found_all
    return Example(
        f"{name}:{length}:{sample}",
        prompt,
        f"{name} {length}",
        max_new_tokens=count,
        score=lambda written: metric(written, parts.answers),
        info={"answers": parts.answers, "tokens": len(prompt)},
    )


def _noise(source: Source, room: int) -> Tokens:
    filler = source.tokens(FILLER)
    return (filler * (room // len(filler) + 1))[: max(0, room)]
