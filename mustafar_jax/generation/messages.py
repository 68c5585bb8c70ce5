"""Messages of a conversation, and the tokens that a chat template makes of them."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, str]
"""Who says what: {"role": "user", "content": "Why is the sky blue?"}."""

ROLES = ("system", "user", "assistant", "tool")
"""Who may speak; a chat template may know fewer."""

_FIELDS = ("role", "content")
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")  # the first one counts


def check_messages(messages: Any) -> list[Message]:
    """Messages, as they are given.

    Raises:
        TypeError: anything else than a sequence of mappings; a role or content that is no text.
        ValueError: a message with another field, without one, or of an unknown role; a text that is no text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages is of type {type(messages).__name__}; wanted a list of messages")
    return [_check_message(f"messages[{number}]", message) for number, message in enumerate(messages)]


def _check_message(name: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise TypeError(f'{name} is of type {type(message).__name__}; wanted {{"role": ..., "content": ...}}')
    if unknown := [field for field in message if field not in _FIELDS]:
        raise ValueError(f"{name} has the unknown field {unknown[0]!r}; wanted 'role' and 'content' alone")
    if missing := [field for field in _FIELDS if field not in message]:
        raise ValueError(f"{name} lacks {missing[0]!r}; wanted 'role' and 'content'")
    for field in _FIELDS:
        check_text(f"{name}[{field!r}]", message[field])
    if message["role"] not in ROLES:
        raise ValueError(f"{name}['role']={message['role']!r} must be one of {', '.join(ROLES)}")
    return {field: message[field] for field in _FIELDS}


def check_text(name: str, text: Any) -> None:
    """Raise TypeError for what is no text, ValueError for one that holds surrogates."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is of type {type(text).__name__}; wanted one text")
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python reads bytes that are not UTF-8
        raise ValueError(f"{name}={reprlib.repr(text)} holds bytes that are no text; wanted UTF-8")


def check_template(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("this tokenizer has no chat template, which messages need")


def rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a conversation, with the answer to come; ValueError where the chat template fails."""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's, which may raise anything
        line = getattr(error, "lineno", None)  # of a syntax error
        place = f", line {line}" if line else ""
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template of {template_source(tokenizer)}{place} fails: {message}") from error


def tokens_of(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation, with the answer to come; ValueError where there are none."""
    text = rendered(tokenizer, messages)
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"the chat template of {template_source(tokenizer)} makes no tokens of the messages")
    return tokens


def template_source(tokenizer: Any) -> str:
    """Where a tokenizer's chat template comes from: its file where that is known."""
    name = str(getattr(tokenizer, "name_or_path", None) or "this tokenizer")
    files = [Path(name, file) for file in _TEMPLATE_FILES]
    return str(next((file for file in files if file.is_file()), name))
