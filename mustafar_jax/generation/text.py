"""Between text and tokens: prompts, chat templates, and generated text as it comes."""

import re
import reprlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from mustafar_jax.generation import loop
from mustafar_jax.generation.loop import Generation
from mustafar_jax.generation.messages import check_template, check_text, rendered, template_source
from mustafar_jax.generation.protocols import Model

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's bytes, for characters without a token
# How a text ends whose last space may go with what follows, in transformers' `clean_up_tokenization`: the beginnings of
# " .", " n't", " 've" and the like, and " ' ", whose second space a full stop may take first.
_MAY_LOSE_A_SPACE = re.compile(r" (?:'[vr]?|n'?)?$")

T = TypeVar("T")
R = TypeVar("R")


class Returned(Generic[T, R]):
    """Iterates a generator once, and keeps what it returns in `value`."""

    value: R

    def __init__(self, generator: Generator[T, None, R]) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[T]:
        self.value = yield from self.generator


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> np.ndarray:
    """A prompt's tokens, int32 [1, S].

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: the text.
        chat: make it the user's turn of a conversation, by the tokenizer's chat template, with the answer to come.

    Raises:
        ValueError: an empty prompt, one that holds surrogates, or one of which the tokenizer or the chat template
            leaves nothing; `chat` where the tokenizer has no chat template, or one that fails.
        TypeError: a prompt that is no text.
    """
    check_text("prompt", prompt)
    if not prompt:
        raise ValueError("prompt='' is empty; wanted some text")
    if chat:
        check_template(tokenizer)
    text = rendered(tokenizer, [{"role": "user", "content": prompt}]) if chat else prompt
    tokens = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not tokens:
        source = f"the chat template of {template_source(tokenizer)}" if chat and not text else "the tokenizer"
        raise ValueError(f"prompt={reprlib.repr(prompt)}: {source} makes no tokens of it; wanted at least one")
    return np.asarray(tokens, np.int32)[None]


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Texts that end an answer, none for None; TypeError for what is no text, ValueError for an empty one."""
    texts = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, list | tuple):
        raise TypeError(f"stop is of type {type(stop).__name__}; wanted a text, or a list of texts")
    texts = tuple(texts)
    for text in texts:
        check_text("stop", text)
        if not text:
            raise ValueError("stop='' is empty; wanted some text")
    return texts


def stream_text(
    model: Model, tokenizer: Any, tokens: np.ndarray, *, stop: str | Sequence[str] = (), **options: Any
) -> Generator[str, bool | None, Generation]:
    """Continue one prompt, yielding the text that each step adds; '' where later tokens may still change it.

    That is so within a character of several tokens, before a space that the tokenizer may clean up, and within what may
    become a text of `stop`. Together the pieces are `tokenizer.decode` of all tokens without the special ones, up to
    the first text of `stop`: what is open when the last step has come is yielded after it.
    What the generator returns then, its StopIteration's value, is the `Generation`. `send(True)` ends it as it does
    `stream`, perhaps after a last piece.

    Args:
        model: the model.
        tokenizer: a Hugging Face tokenizer.
        tokens: int32 [1, S], as `encode` gives them.
        stop: texts that end the answer; the tokens in which one was found are part of the `Generation`.
        options: those of `generate`.

    Raises:
        ValueError, TypeError: as `generate` does, and more than one prompt; before any work is done.
    """
    stops = check_stop(stop)
    steps = loop.stream(model, tokens, **options)
    if len(tokens) != 1:
        raise ValueError(f"tokens has shape {np.shape(tokens)}; wanted one prompt, [1, S]")
    pieces = _pieces(tokenizer, steps)
    return _until(pieces, stops) if stops else pieces


def finish(pieces: Generator[str, bool | None, Generation]) -> tuple[list[str], Generation]:
    """Tell a stream of text to stop: what is left of it, and the generation."""
    rest: list[str] = []
    while True:
        try:
            rest.append(pieces.send(True))
        except StopIteration as end:
            return rest, end.value


def _until(
    pieces: Generator[str, bool | None, Generation], stops: tuple[str, ...]
) -> Generator[str, bool | None, Generation]:
    """The pieces up to the first of these texts, where the generation ends; what may be the beginning of one waits."""
    waiting, told = "", None
    while True:
        try:
            waiting += pieces.send(told)
        except StopIteration as end:
            if waiting:
                yield waiting
            return end.value
        if found := [place for stop in stops if (place := waiting.find(stop)) >= 0]:
            _, last = finish(pieces)
            yield waiting[: min(found)]
            return last
        ready = len(waiting) - max(_beginning(waiting, stop) for stop in stops)
        told = yield waiting[:ready]
        waiting = waiting[ready:]


def _beginning(text: str, stop: str) -> int:
    """How many characters at a text's end are the beginning of another."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _pieces(
    tokenizer: Any, stream: Generator[np.ndarray, bool | None, Generation]
) -> Generator[str, bool | None, Generation]:
    """The text that each step adds, and what is left at the end; returns what the stream does."""
    written: list[int] = []
    # Each step decodes the last shown piece and what follows it: a token's text may depend on the one before.
    context, shown, rest, told = 0, 0, "", None
    while True:
        try:
            step = stream.send(told)
        except StopIteration as end:
            if rest:
                yield rest
            return end.value
        written.append(int(step[0]))
        before = _decode(tokenizer, written[context:shown])
        rest = _decode(tokenizer, written[context:])[len(before) :]
        if not _is_settled(tokenizer, written[context:]):
            told = yield ""
            continue
        told = yield rest
        # Without text of its own, a piece does not keep the first space of what follows.
        context = shown if _decode(tokenizer, written[shown:]) else context
        shown, rest = len(written), ""


def _is_settled(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether these tokens' text stays as it is, whatever tokens come after them."""
    if _ends_in_bytes(tokenizer, tokens):
        return False
    cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    text = _decode(tokenizer, tokens, **({"clean_up_tokenization_spaces": False} if cleans_up else {}))
    if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that is not yet whole
        return False
    return not (cleans_up and _MAY_LOSE_A_SPACE.search(text))


def _ends_in_bytes(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether the last token with a text is a byte: bytes in a row that are no text together are all shown as �."""
    for token in reversed(tokens):
        if _BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(token) or ""):
            return True
        if _decode(tokenizer, [token]):
            return False
    return False


def _decode(tokenizer: Any, tokens: Sequence[int], **options: bool) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, **options)
