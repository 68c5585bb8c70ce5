"""Text in, text out: one answer to messages, and conversations whose turns go on from the same caches."""

import dataclasses
import fnmatch
import functools
import json
import os
import zlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from mustafar_jax.backends.registry import Implementation
from mustafar_jax.cache import load_cache, repeat, save, truncate
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.checks import check_config, check_integer, check_model
from mustafar_jax.generation.loop import Generation
from mustafar_jax.generation.messages import Message, check_messages, check_template, check_text, tokens_of
from mustafar_jax.generation.prefill import embed
from mustafar_jax.generation.programs import padded
from mustafar_jax.generation.protocols import Caches, Model
from mustafar_jax.generation.sampling import check_key
from mustafar_jax.generation.text import check_stop, finish, stream_text

CAPACITY = 4096
"""Tokens that a conversation has room for unless told."""

_FILE, _CACHES = "conversation.json", "caches-*.safetensors"
_FORMAT = "mustafar_jax conversation, version 2"
_FINGERPRINTED = 16
"""Tokens whose embeddings tell models apart."""


def chat(
    model: Model,
    tokenizer: Any,
    messages: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 512,
    capacity: int | None = None,
    **options: Any,
) -> str:
    """One answer to messages.

    Args:
        model, tokenizer: as `models.load` gives them; the tokenizer has a chat template.
        messages: a text, or messages {"role": ..., "content": ...} of which the last is the user's.
        max_new_tokens: tokens of the answer at most.
        capacity: as in `Conversation`; if None, for these messages and the answer, padded.
        options: `Conversation`'s: `config`, `stop`, `temperature`, `key`, ...

    Returns:
        The answer, without special tokens and without what `stop` names.

    Raises:
        ValueError, TypeError, NotImplementedError: as `Conversation` and `generate` do, before any work.
    """
    given = check_messages([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
    if not given or given[-1]["role"] != "user":
        raise ValueError(f"messages ends with {given[-1]['role'] if given else 'nothing'}; wanted a user's last")
    check_model(model)
    check_template(tokenizer)
    if capacity is None:
        wanted = len(tokens_of(tokenizer, given)) + check_integer("max_new_tokens", max_new_tokens)
        capacity = padded(wanted, model.config.max_position_embeddings)
    options |= {"capacity": capacity, "max_new_tokens": max_new_tokens}
    return Conversation(model, tokenizer, given[:-1], **options).say(given[-1]["content"])


class Conversation:
    """Turns of a user and of a model, through caches that hold what was said.

    Each turn renders the whole conversation with the chat template. Where its tokens begin with those that the caches
    hold, only the others pass the model. Where the template rewrites what came before, or the tokenizer spells an
    answer with other tokens than the model did, the caches go back to where the two part, by `truncate`; and where that
    is packed already, the conversation is read anew. So what a model sees is always what the template says.

    A turn that fails leaves the messages as they were.

    Attributes:
        messages: what was said so far; may be changed between turns.

    Args:
        model, tokenizer: as `models.load` gives them; the tokenizer has a chat template.
        messages: what stands before the first turn, such as a system message.
        capacity: tokens that the caches have room for, all turns together; `CAPACITY` if None, within the model's
            context. Turns compile nothing new but for prompts of another padded length.
        config: how the caches are compressed; a dense cache if None.
        max_new_tokens: tokens of an answer at most; fewer where the room ends.
        stop: texts that end an answer; neither they nor what follows is part of it.
        key: as in `generate`; each turn draws with its own.
        temperature, top_k, top_p, min_p, eos_id, implementation: as in `generate`. Where neither `eos_id` nor the model
            names one, the tokenizer's eos token ends an answer.

    Raises:
        ValueError: messages of unknown fields or roles, no chat template, a capacity out of range.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        messages: Sequence[Mapping[str, str]] = (),
        *,
        capacity: int | None = None,
        config: CompressionConfig | None = None,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        key: jax.Array | None = None,
        eos_id: int | Sequence[int] | None = None,
        implementation: Implementation = None,
    ) -> None:
        check_model(model)
        check_template(tokenizer)
        context = model.config.max_position_embeddings
        self.capacity = min(CAPACITY, context) if capacity is None else check_integer("capacity", capacity)
        if not 1 <= self.capacity <= context:
            raise ValueError(f"{capacity=} must lie in 1 .. {context}, the model's context")
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
        if self.max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} must be an integer of at least 1")
        self.model, self.tokenizer, self.config = model, tokenizer, check_config(config)
        self.messages = check_messages(messages)
        if key is not None:
            check_key(key)
        self.key = key
        self.options: dict[str, Any] = {
            "stop": check_stop(stop),
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "eos_id": _eos_of(model, tokenizer) if eos_id is None else eos_id,
            "implementation": implementation,
        }
        self._tokens: list[int] = []  # that the caches hold
        self._caches: Caches | None = None
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the caches hold; 0 before the first turn."""
        return sum(cache.nbytes for cache in self._caches or ())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that dense caches of this capacity take; 0 before the first turn."""
        return sum(cache.dense_nbytes for cache in self._caches or ())

    @property
    def num_tokens(self) -> int:
        """Tokens that the caches hold."""
        return len(self._tokens)

    def say(self, text: str) -> str:
        """Take a turn: the user's text, and the whole answer to it. Errors are those of `stream`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Generator[str, bool | None, Generation]:
        """Take a turn: yield the answer's text as it comes, '' where later tokens may still change it.

        `send(True)`, or `close`, ends the answer where it is; it is then what was said.

        Args:
            text: what the user says.

        Returns:
            A generator of pieces, which returns the `Generation`; its caches are the conversation's own.

        Raises:
            ValueError: a text that is no text; messages that the template refuses, or that leave no room for an answer;
                and as `generate` does. All before any work but for logits that are not finite.
            RuntimeError: when it is iterated after the conversation has gone on otherwise.
        """
        check_text("text", text)
        messages = [*check_messages(self.messages), {"role": "user", "content": text}]
        tokens = tokens_of(self.tokenizer, messages)
        room = self.capacity - len(tokens)
        if room < 1:
            raise ValueError(f"the conversation's {len(tokens)} tokens leave no room in a capacity of {self.capacity}")
        held, caches = self._continued(tokens)
        pieces = stream_text(
            self.model,
            self.tokenizer,
            np.asarray([tokens[held:]], np.int32),
            max_new_tokens=min(self.max_new_tokens, room),
            config=self.config,
            key=None if self.key is None else jax.random.fold_in(self.key, self._turn),
            capacity=self.capacity,
            caches=caches,
            **self.options,
        )
        return self._answer(messages, tokens, pieces, self._turn)

    def undo(self) -> None:
        """Take back the last turn: the user's last message, and what follows it. ValueError where there is none."""
        last = max((number for number, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ValueError("there is no turn to undo")
        self.messages = self.messages[:last]
        self._turn += 1

    def fork(self, key: jax.Array | None = None) -> Self:
        """A conversation that has been the same until now; its caches are copies.

        Args:
            key: what the copy samples with; if None that of this one, with which it draws the same answers.
        """
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.messages, other._tokens = [dict(message) for message in self.messages], list(self._tokens)
        other._caches = None if self._caches is None else repeat(self._caches, 1)
        other.key = self.key if key is None else key
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and caches into a folder, which is made where there is none; what was saved there is replaced.

        Raises:
            OSError: as writing does.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        name = None
        if self._caches is not None:
            name = _CACHES.replace("*", f"{zlib.crc32(np.asarray(self._tokens, np.int32).tobytes()):08x}")
            save(self._caches, folder / name)
        about: dict[str, Any] = {"format": _FORMAT, "messages": self.messages, "tokens": self._tokens, "caches": name}
        about |= {"capacity": self.capacity, "config": dataclasses.asdict(self.config)}
        about |= {"turn": self._turn, "model": None if name is None else _fingerprint(self.model, self._tokens)}
        part = folder / f".{_FILE}.{os.getpid()}.part"
        part.write_text(json.dumps(about), encoding="utf-8")
        part.replace(folder / _FILE)
        for old in folder.glob(_CACHES):
            if old.name != name:
                old.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model, tokenizer: Any, **options: Any) -> Self:
        """Go on with a conversation that `save` wrote.

        Args:
            path: of the folder.
            model, tokenizer: those that it was with.
            options: those of `Conversation`, but for messages, capacity and config, which were saved. A key draws on
                from the turn that is next.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a folder that is damaged; caches of another model: of another shape, with other RoPE frequencies
                where keys are centred, or with other embeddings of the conversation's first tokens. One that differs
                in other weights alone is not noticed.
        """
        folder = Path(path)
        saved = _read(folder / _FILE)
        made = cls(model, tokenizer, saved.messages, capacity=saved.capacity, config=saved.config, **options)
        made._turn = saved.turn
        if saved.caches is not None:
            make = functools.partial(model.init_cache, made.config, batch=1, capacity=made.capacity)
            caches = load_cache(folder / saved.caches, like=jax.eval_shape(make))
            if any(cache.lengths.tolist() != [len(saved.tokens)] for cache in caches):
                raise ValueError(
                    f"{folder} is damaged: its caches do not hold the {len(saved.tokens)} tokens that it says"
                )
            if saved.model != _fingerprint(model, saved.tokens):
                raise ValueError(f"{folder} holds caches of another model, which has other embeddings")
            made._caches, made._tokens = caches, saved.tokens
        return made

    def _continued(self, tokens: list[int]) -> tuple[int, Caches | None]:
        """How many of a conversation's tokens need not pass the model again, and caches that hold these; 0 and None."""
        if self._caches is None:
            return 0, None
        pairs = enumerate(zip(self._tokens, tokens, strict=False))
        most = min(len(self._tokens), len(tokens) - 1)  # the last one gives the logits to go on from
        same = next((number for number, (one, other) in pairs if number == most or one != other), most)
        if same == len(self._tokens):
            return same, self._caches
        if same <= self.config.sink_tokens:  # statistics of keys would stay those of what is no longer said
            return 0, None
        try:
            return same, truncate(self._caches, [same])
        except ValueError:  # it is packed
            return 0, None

    def _answer(
        self, messages: list[Message], tokens: list[int], pieces: Generator[str, bool | None, Generation], turn: int
    ) -> Generator[str, bool | None, Generation]:
        """See `stream`. From its first step on the caches are the generation's, until it gives them back."""
        self._check_turn(turn)
        self._turn = turn = turn + 1
        self._tokens, self._caches = [], None
        written: list[str] = []
        told: bool | None = None
        try:
            while True:
                try:
                    written.append(pieces.send(told))
                except StopIteration as stopped:
                    end: Generation = stopped.value
                    break
                told = yield written[-1]
                self._check_turn(turn)
        except GeneratorExit:
            if turn != self._turn:  # whoever went on has caches of their own
                pieces.close()
                raise
            rest, end = finish(pieces)
            self._take(messages, tokens, [*written, *rest], end)
            raise
        self._take(messages, tokens, written, end)
        return end

    def _check_turn(self, turn: int) -> None:
        """Raise RuntimeError where another turn has begun, or been undone."""
        if turn != self._turn:
            raise RuntimeError("the conversation has gone on since this stream was made; make another")

    def _take(self, messages: list[Message], tokens: list[int], written: list[str], end: Generation) -> None:
        """Add a turn, whose answer the caches hold."""
        self.messages = [*messages, {"role": "assistant", "content": "".join(written)}]
        self._tokens = [*tokens, *np.asarray(end.tokens)[0, : int(end.lengths[0])].tolist()]
        self._caches = end.caches


def _eos_of(model: Model, tokenizer: Any) -> Any:
    """What ends an answer: None for the model's own tokens; where it names none, the tokenizer's."""
    if getattr(model.config, "eos_ids", None):
        return None
    return () if (token := getattr(tokenizer, "eos_token_id", None)) is None else token


def _fingerprint(model: Model, tokens: list[int]) -> int:
    """A number that tells models apart, by their embeddings of a conversation's first tokens."""
    first = np.resize(np.asarray(tokens, np.int32), (1, _FINGERPRINTED))
    return zlib.crc32(np.asarray(embed(model, first)).tobytes())


class _Saved(NamedTuple):
    """What a conversation's file says."""

    messages: list[Message]
    tokens: list[int]
    caches: str | None
    capacity: int
    config: CompressionConfig
    model: int | None
    turn: int


def _read(file: Path) -> _Saved:
    """The content of a conversation's file; ValueError for one that is damaged."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    found = about.get("format") if isinstance(about, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{file} says that it is of format {found!r}; wanted {_FORMAT!r}")
    if missing := [name for name in _Saved._fields if name not in about]:
        raise ValueError(f"{file} is damaged: it lacks {missing[0]!r}")
    try:
        return _Saved(
            check_messages(about["messages"]),
            [_token(token) for token in about["tokens"]],
            _name_of_caches(about["caches"]),
            check_integer("capacity", about["capacity"]),
            CompressionConfig(**about["config"]),
            about["model"],
            check_integer("turn", about["turn"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _token(given: Any) -> int:
    token = check_integer("tokens", given)
    if not 0 <= token < 2**31:
        raise ValueError(f"tokens={token} must lie in 0 .. 2**31 - 1")
    return token


def _name_of_caches(name: Any) -> str | None:
    """The file's name, which lies in the folder itself."""
    if name is None or (isinstance(name, str) and fnmatch.fnmatch(name, _CACHES) and Path(name).name == name):
        return name
    raise ValueError(f"caches={name!r} is no name of a file of caches")
