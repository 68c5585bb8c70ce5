"""RULER's thirteen tasks (arXiv 2404.06654, section 3), from generators of our own after the paper's description.

Eight needle tasks differ in what hides the needles, in their keys and values, and in how many there are; one traces
variables that are assigned to each other; two ask for the commonest words of a list; two are questions whose documents
lie among others. Scores are RULER's: the share of the answers found in what the model writes; for questions, whether
any is found. Prompts show no worked example, and words are made of syllables.

Two sources are the user's: a text that hides needles (essays there), repeated where it is too short, and for the
questions JSON Lines files, one object per line, with the fields

    question   text
    answers    list of texts; empty ones do not count
    documents  list of texts, which together answer the question; they are put among those of the other rows
"""

import dataclasses
import functools
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mustafar_jax.quality import metrics
from mustafar_jax.quality.examples import (
    Example,
    Problem,
    Row,
    first_tokens,
    read_rows,
    read_text,
    tokens_after,
    tokens_of,
    usable,
)
from mustafar_jax.quality.needle import insert, noise

Tokens = list[int]


class NoRoomError(ValueError):
    """A text does not fit in the tokens that there are for it."""


class Parts(NamedTuple):
    """A prompt before it has its length: what stands before and after the text that fills it, and the answers.

    Attributes:
        head, tail: of the prompt; the tail begins the answer.
        answers: to be found in what the model writes.
        fill: room in tokens -> the text's tokens; raises NoRoomError.
    """

    head: str
    tail: str
    answers: list[str]
    fill: Callable[[int], Tokens]


@dataclasses.dataclass(frozen=True)
class Source:
    """What tasks are made of: random numbers, the tokenizer, the text that hides needles; a question, and documents."""

    rng: np.random.Generator
    tokenizer: Any
    text: Tokens
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: Sequence[str] = ()

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text that others stand before."""
        return tokens_after(self.tokenizer, text)

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
        """Consecutive tokens of the text, which is repeated where it has too few."""
        start = int(self.rng.integers(max(1, len(self.text) - room + 1)))
        return (self.text * (room // len(self.text) + 1))[start : start + room]

    def most(self, build: Callable[[int], str], room: int, least: int = 1, limit: int | None = None) -> Tokens:
        """The tokens of build(n) for the largest n, from `least` to `limit`, with which there is room.

        build(n + 1) is not shorter than build(n), and without a limit it grows.

        Raises:
            NoRoomError: build(least) is too long.
        """

        def fits(count: int) -> bool:
            return len(self.tokens(build(count))) <= room

        if not fits(least):
            raise NoRoomError(f"there is no room for a text in {max(0, room)} tokens")
        low, high = least, least + 1
        while (limit is None or high <= limit) and fits(high):
            low, high = high, 2 * high
        high = high if limit is None else min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
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
        names = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        if len(pairs) == 1:
            what, subject, verb = "What is", f"the secret {self.value} of {names}", "is"
        else:
            what, subject, verb = "What are all", f"the secret {self.value}s of {names}", "are"
        return Parts(
            f"Secret {self.value}s are hidden in the following text. Remember them.\n\n",
            f"\n\nQuestion: {what} {subject} in the text?\nAnswer: In the text, {subject} {verb}",
            [value for _, value in pairs],
            functools.partial(self._fill, source, asked, [self._needle(*pair) for pair in pairs + distraction]),
        )

    def _fill(self, source: Source, asked: list[str], needles: list[str], room: int) -> Tokens:
        if self.hay == "needles":
            return self._among_needles(source, asked, needles, room)
        pieces = [(float(source.rng.random()), source.tokens(needle)) for needle in needles]
        left = _left(room, [tokens for _, tokens in pieces])
        return insert(
            source.tokenizer, source.stretch(left) if self.hay == "text" else noise(source.tokenizer, left), pieces
        )

    def _among_needles(self, source: Source, asked: list[str], needles: list[str], room: int) -> Tokens:
        places = source.rng.random(len(needles))
        others = self._others(source, asked)
        hay: list[str] = []  # grows with the counts that are tried

        def build(count: int) -> str:
            hay.extend(next(others) for _ in range(count - len(hay)))
            lines = hay[:count]
            for place, needle in zip(places, needles, strict=True):
                lines.insert(int(place * len(lines)), needle)
            return "".join(lines)

        return source.most(build, room)

    def _others(self, source: Source, asked: list[str]) -> Iterator[str]:
        """Needles of other keys, all different."""
        taken = set(asked)
        while True:
            [key] = self._keys(source, 1)
            value = self._value(source)
            if key not in taken:
                taken.add(key)
                yield self._needle(key, value)

    def _needle(self, key: str, value: str) -> str:
        return f" One of the secret {self.value}s of {key} is {value}."

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
        hay = noise(source.tokenizer, _left(room, lines))
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


def frequent_words(source: Source, *, asked: int = 3) -> Parts:
    """Aggregation: the three commonest words, where the k-th of a text of n stands in it n / (zeta(2) k**2) times.

    As RULER's generator has it (NVIDIA/RULER, freq_words_extraction.py): the counts are that share, rounded down, so
    that no two of the words asked for are equally common; the commonest of all is noise, three dots; and there is one
    word for each 50 tokens.
    """
    frequent = source.words(asked)
    seed = int(source.rng.integers(2**32))

    def fill(room: int) -> Tokens:
        size = max(asked + 2, room // 50)
        words = ["...", *dict.fromkeys([*frequent, *source.words(size)])][:size]
        share = 6 / np.pi**2 / np.arange(1, size + 1) ** 2

        def build(count: int) -> str:
            listed = np.repeat(words, (count * share).astype(int))
            return " ".join(np.random.default_rng(seed).permutation(listed))

        # From so many words on, the last one that is asked for is commoner than the next.
        least = int(1 / (share[asked] - share[asked + 1])) + 1
        return source.most(build, room, least)

    return Parts(
        "Read the following text of made-up words and remember how often each stands in it.\n\n",
        f"\n\nQuestion: Which {asked} words, not counting the dots, stand in the text most often?\n"
        f"Answer: The {asked} words that stand in the text most often:",
        frequent,
        fill,
    )


def questions(source: Source) -> Parts:
    """Question answering: a row's documents, among as many of other rows as there is room for."""
    own = source.row["documents"]
    others = [document for document in source.documents if document not in own]
    others = [others[i] for i in source.rng.permutation(len(others))]
    order = source.rng.random(len(others) + len(own))

    def build(count: int) -> str:
        chosen = own + others[:count]
        shuffled = [chosen[i] for i in np.argsort(order[: len(chosen)])]
        return "\n\n".join(f"Document {index}:\n{document}" for index, document in enumerate(shuffled, 1))

    return Parts(
        "Answer the question from the following documents, in a few words.\n\n",
        f"\n\nQuestion: {source.row['question']}\nAnswer:",
        [answer for answer in source.row["answers"] if answer.strip()],
        lambda room: source.most(build, room, least=0, limit=len(others)),
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


QUESTIONS = ("qa_1", "qa_2")
"""Whose questions the user's files hold, in this order."""

_FIELDS = {"question": str, "answers": list, "documents": list}


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
    """Examples of the tasks at each length, and the lines and files of questions that are left out.

    Args:
        tokenizer: the model's.
        text: UTF-8, hides needles.
        tasks: names in `TASKS`; if empty, all that there are files for.
        questions: JSON Lines files of qa_1 and qa_2.
        lengths: tokens of prompt and answer together, at most.
        samples: examples of each task at each length.
        seed: of all that is random; a task's examples do not depend on which others are made.

    Raises:
        ValueError: an unknown task, one without its file, a file without its task, an empty text, a length too short,
            no usable line in any file where questions alone are asked.
    """
    _check(tasks, questions)
    hay = tokens_of(tokenizer, read_text(text))
    made: list[Example] = []
    problems: list[Problem] = []
    for name in dict.fromkeys(tasks or TASKS):
        make = functools.partial(_example, tokenizer, hay, seed, name)
        if name not in QUESTIONS:
            made += [make(length, sample) for length in lengths for sample in range(samples)]
        elif QUESTIONS.index(name) < len(questions):
            file = questions[QUESTIONS.index(name)]
            rows, bad = read_rows(file, _FIELDS)
            problems += bad
            for length in lengths if rows else ():
                order = np.random.default_rng([seed, list(TASKS).index(name), length]).permutation(len(rows))
                found, bad = _ask(make, length, samples, file, [rows[i] for i in order])
                made, problems = made + found, problems + bad
    return usable(made, problems)


def _check(tasks: Sequence[str], questions: Sequence[pathlib.Path]) -> None:
    if len(questions) > len(QUESTIONS):
        raise ValueError(f"questions names {len(questions)} files; wanted one for each of {QUESTIONS}")
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"task {name!r} is none of {sorted(TASKS)}")
        if name in QUESTIONS[len(questions) :]:
            raise ValueError(f"{name} needs {QUESTIONS.index(name) + 1} question files; got {len(questions)}")
    if questions and tasks and QUESTIONS[len(questions) - 1] not in tasks:
        last = QUESTIONS[len(questions) - 1]
        raise ValueError(f"questions names {len(questions)} files, the last for {last}; tasks={list(tasks)} lacks it")


def _ask(
    make: Callable[..., Example], length: int, samples: int, file: pathlib.Path, rows: Sequence[Row]
) -> tuple[list[Example], list[Problem]]:
    """Examples of the first rows that fit, and a problem for each that does not."""
    documents = list(dict.fromkeys(document for _, row in rows for document in row["documents"]))
    made: list[Example] = []
    problems: list[Problem] = []
    for line, row in rows:
        if len(made) == samples:
            break
        try:
            made.append(make(length, len(made), row, documents))
        except NoRoomError as error:
            problems.append(Problem(str(file), line, str(error)))
    if problems and not made:  # one problem, not one for each row
        return [], [dataclasses.replace(problems[0], line=0, what=f"no row fits; {problems[0].what}")]
    if len(made) < samples:
        problems.append(Problem(str(file), 0, f"{len(made)} rows to ask at {length=}; wanted {samples=}"))
    return made, problems


def _example(
    tokenizer: Any,
    hay: Tokens,
    seed: int,
    name: str,
    length: int,
    sample: int,
    row: Mapping[str, Any] | None = None,
    documents: Sequence[str] = (),
) -> Example:
    rng = np.random.default_rng([seed, list(TASKS).index(name), length, sample])
    source = Source(rng, tokenizer, hay, row or {}, documents)
    parts, count = TASKS[name].make(source), TASKS[name].max_new_tokens
    head, tail = [*first_tokens(tokenizer), *tokens_of(tokenizer, parts.head)], source.tokens(parts.tail)
    try:
        prompt = np.asarray([*head, *parts.fill(length - count - len(head) - len(tail)), *tail], np.int32)
    except NoRoomError as error:
        raise NoRoomError(f"{length=} leaves no room for {name}: {error}") from error
    metric = metrics.found_any if name in QUESTIONS else metrics.found_all
    return Example(
        f"{name}:{length}:{sample}",
        prompt,
        f"{name} {length}",
        max_new_tokens=count,
        score=lambda written: metric(written, parts.answers),
        info={"answers": parts.answers, "tokens": len(prompt)},
    )


def _left(room: int, pieces: Sequence[Tokens]) -> int:
    """Tokens for what hides the pieces."""
    left = room - sum(map(len, pieces))
    if left < 1:
        raise NoRoomError(
            f"there is no room for a text in {max(0, room)} tokens beside the {room - left} that it hides"
        )
    return left
