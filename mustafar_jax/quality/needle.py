"""A needle in a haystack, and the passkey: one sentence to be remembered from a long text.

The needle test hides a fact in a text of the user's; the passkey (arXiv 2305.16300, section 4.2) hides it in a few
sentences that are repeated. Both score the tokens of the answer, a blank and seven digits, under teacher forcing: their
mean probability, and whether each is the likeliest, which is to say that greedy decoding writes the answer.
"""

import bisect
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mustafar_jax.quality.examples import Example, first_tokens, read_text, tokens_after, tokens_of

DIGITS = 7

FILLER = (
    "Rain fell on the harbour. The boats lay still. A lamp was lit and put out again. Nobody came, and nobody left. "
)

CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Dakar", "Minsk", "Tunis", "Kyoto", "Porto")


def needles(
    tokenizer: Any, haystack: pathlib.Path, *, lengths: Sequence[int], depths: int = 10, repeats: int = 1, seed: int = 0
) -> list[Example]:
    """Needles at even depths of texts taken from a file.

    Args:
        tokenizer: the model's.
        haystack: a UTF-8 text.
        lengths: tokens of a prompt, needle and question included.
        depths: where the needle stands, from the beginning (0) to the end (1).
        repeats: examples at each length and depth, of other stretches of text and other needles.
        seed: of stretches, cities and numbers.

    Raises:
        ValueError: a text, or a length, that is too short.
    """
    ids = tokens_of(tokenizer, read_text(haystack))
    if len(ids) < max(lengths):
        raise ValueError(f"{haystack} has {len(ids)} tokens; a haystack of {max(lengths)} needs as many")
    rng = np.random.default_rng(seed)

    def stretch(count: int) -> list[int]:
        start = int(rng.integers(len(ids) - count + 1))
        return ids[start : start + count]

    found = []
    for length, depth, repeat in _places(lengths, depths, repeats):
        city, number = CITIES[rng.integers(len(CITIES))], _number(rng)
        fact = f" The secret number of {city} is {number}."
        question = f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
        name = f"needle:{length}:{depth:.2f}:{repeat}"
        found.append(_hide(tokenizer, name, stretch, fact, question, number, length, depth))
    return found


def passkeys(
    tokenizer: Any, *, lengths: Sequence[int], depths: int = 10, repeats: int = 1, seed: int = 0
) -> list[Example]:
    """Passkeys at even depths of repeated sentences; arguments and errors as those of `needles`."""
    rng, stretch = np.random.default_rng(seed), functools.partial(noise, tokenizer)
    found = []
    for length, depth, repeat in _places(lengths, depths, repeats):
        number = _number(rng)
        fact = f" The pass key is {number}. Remember it. {number} is the pass key."
        question = "\n\nQuestion: What is the pass key?\nAnswer: The pass key is"
        name = f"passkey:{length}:{depth:.2f}:{repeat}"
        found.append(_hide(tokenizer, name, stretch, fact, question, number, length, depth))
    return found


def noise(tokenizer: Any, count: int) -> list[int]:
    """So many tokens of a few sentences, repeated."""
    filler = tokens_after(tokenizer, FILLER, before="\n")
    return (filler * (count // len(filler) + 1))[:count]


def _places(lengths: Sequence[int], depths: int, repeats: int) -> Iterator[tuple[int, float, int]]:
    for length in lengths:
        for depth in np.linspace(0, 1, depths):
            for repeat in range(repeats):
                yield length, float(depth), repeat


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))


def _hide(
    tokenizer: Any, name: str, stretch: Any, fact: str, question: str, number: str, length: int, depth: float
) -> Example:
    """A prompt of `length` tokens with the fact at a depth, behind the end of a sentence where one is near."""
    before, needle, after = first_tokens(tokenizer), tokens_after(tokenizer, fact), tokens_after(tokenizer, question)
    room = length - len(before) - len(needle) - len(after)
    if room < 1:
        raise ValueError(f"{length=} leaves no room for text beside {length - room} tokens of needle and question")
    prompt = [*before, *insert(tokenizer, stretch(room), [(depth, needle)]), *after]
    gold = tokens_after(tokenizer, f" {number}", before=question)
    kind = name.partition(":")[0]
    return Example(
        name,
        np.asarray(prompt, np.int32),
        f"{kind} {length}",
        gold=np.asarray(gold, np.int32),
        info={"length": length, "depth": depth, "answer": number},
    )


def insert(tokenizer: Any, text: Sequence[int], pieces: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
    """Put pieces, each at a depth of 0 .. 1, into a text's tokens: behind the end of the nearest sentence."""
    ends = [0, *(i + 1 for i, token in enumerate(text) if tokenizer.decode([token]).rstrip().endswith(".")), len(text)]
    whole, done = [], 0
    for depth, piece in sorted(pieces, key=lambda piece: piece[0]):
        wanted = depth * len(text)
        right = bisect.bisect_left(ends, wanted)
        place = min(ends[max(0, right - 1) : right + 1], key=lambda end: abs(end - wanted))
        whole += [*text[done:place], *piece]
        done = place
    return [*whole, *text[done:]]
