"""Between text and tokens: prompts, chat templates, and generated text as it comes."""

import re
import reprlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mustafar_jax.generation import loop
from mustafar_jax.generation.loop import Generation
from mustafar_jax.generation.protocols import Model

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's bytes, for characters without a token
# How a text ends whose last space may go with what follows, in transformers' `clean_up_tokenization`: the beginnings of
# " .", " n't", " 've" and the like, and " ' ", whose second space a full stop may take first.
_MAY_LOSE_A_SPACE = re.compile(r" (?:'[vr]?|n'?)?$")
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")  # the first one counts

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
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is of type {type(prompt).__name__}; wanted one text")
    if not prompt:
        raise ValueError("prompt='' is empty; wanted some text")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python reads bytes that are not UTF-8
        raise ValueError(f"prompt={reprlib.repr(prompt)} holds bytes that are no text; wanted UTF-8")
    if chat and tokenizer.chat_template is None:
        raise ValueError("chat=True needs a chat template, and this tokenizer has none")
    text = _user_turn(tokenizer, prompt) if chat else prompt
    tokens = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not tokens:
        source = f"the chat template of {_template_source(tokenizer)}" if chat and not text else "the tokenizer"
        raise ValueError(f"prompt={reprlib.repr(prompt)}: {source} makes no tokens of it; wanted at least one")
    return np.asarray(tokens, np.int32)[None]


def _user_turn(tokenizer: Any, prompt: str) -> str:
    """The text of a conversation that the user begins with the prompt; ValueError where the chat template fails."""
    turns = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's, which may raise anything
        line = getattr(error, "lineno", None)  # of a syntax error
        place = f", line {line}" if line else ""
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template of {_template_source(tokenizer)}{place} fails: {message}") from error


def _template_source(tokenizer: Any) -> str:
    """Where a tokenizer's chat template comes from: its file where that is known."""
    name = str(getattr(tokenizer, "name_or_path", None) or "this tokenizer")
    files = [Path(name, file) for file in _TEMPLATE_FILES]
    return str(next((file for file in files if file.is_file()), name))


def stream_text(model: Model, tokenizer: Any, tokens: np.ndarray, **options: Any) -> Generator[str, None, Generation]:
    """Continue one prompt, yielding the text that each step adds; '' where later tokens may still change it.

    That is so within a character of several tokens, and before a space that the tokenizer may clean up. Together the
    pieces are `tokenizer.decode` of all tokens without the special ones: what is open when the last step has come is
    yielded after it.
    What the generator returns then, its StopIteration's value, is the `Generation`.

    Args:
        model: the model.
        tokenizer: a Hugging Face tokenizer.
        tokens: int32 [1, S], as `encode` gives them.
        options: those of `generate`.

    Raises:
        ValueError, TypeError: as `generate` does, and more than one prompt; before any work is done.
    """
    steps = loop.stream(model, tokens, **options)
    if len(tokens) != 1:
        raise ValueError(f"tokens has shape {np.shape(tokens)}; wanted one prompt, [1, S]")
    return _pieces(tokenizer, steps)


def _pieces(tokenizer: Any, stream: Generator[np.ndarray, None, Generation]) -> Generator[str, None, Generation]:
    """The text that each step adds, and what is left at the end; returns what the stream does."""
    steps = Returned(stream)
    written: list[int] = []
    # Each step decodes the last shown piece and what follows it: a token's text may depend on the one before.
    context, shown, rest = 0, 0, ""
    for step in steps:
        written.append(int(step[0]))
        before = _decode(tokenizer, written[context:shown])
        rest = _decode(tokenizer, written[context:])[len(before) :]
        if not _is_settled(tokenizer, written[context:]):
            yield ""
            continue
        yield rest
        # Without text of its own, a piece does not keep the first space of what follows.
        context = shown if _decode(tokenizer, written[shown:]) else context
        shown, rest = len(written), ""
    if rest:
        yield rest
    return steps.value


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
