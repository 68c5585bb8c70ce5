"""Between text and tokens: prompts, chat templates, and generated text as it comes."""

from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from mustafar_jax.generation import loop
from mustafar_jax.generation.loop import Generation
from mustafar_jax.generation.protocols import Model

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
        ValueError: an empty prompt, or `chat` where the tokenizer has no chat template.
        TypeError: a prompt that is no text.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is of type {type(prompt).__name__}; wanted one text")
    if not prompt:
        raise ValueError("prompt='' is empty; wanted some text")
    if not chat:
        return np.asarray(tokenizer(prompt)["input_ids"], np.int32)[None]
    if tokenizer.chat_template is None:
        raise ValueError("chat=True needs a chat template, and this tokenizer has none")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)[None]


def stream_text(model: Model, tokenizer: Any, tokens: np.ndarray, **options: Any) -> Generator[str, None, Generation]:
    """Continue one prompt, yielding the text that each step adds; '' where a character is not yet whole.

    Together the pieces are the text of all tokens: what is not whole when the last step has come is yielded after it.
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
        before = tokenizer.decode(written[context:shown], skip_special_tokens=True)
        rest = tokenizer.decode(written[context:], skip_special_tokens=True)[len(before) :]
        if rest.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
            continue
        yield rest
        context, shown, rest = shown, len(written), ""
    if rest:
        yield rest
    return steps.value
