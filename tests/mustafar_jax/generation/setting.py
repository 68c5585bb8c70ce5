"""Models, prompts and what else the tests of generation share."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import Layer, decode_step
from mustafar_jax.models import Llama, ModelConfig

VOCABULARY = 61


TINY = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=32, max_position_embeddings=512,
)  # fmt: skip


CONFIGS = {
    "recommended": CompressionConfig.recommended(0.7, 0.7),
    "published": CompressionConfig(k_sparsity=0.7, v_sparsity=0.7),
}


# Prompts that are shorter than the dense window, end within it, and have a group to pack; the new tokens take each row
# past the boundaries of two or three groups, at steps of its own.
LENGTHS = np.array([1, 20, 41, 70])


NEW = 90


CAPACITY = 70 + NEW


PROMPTS = np.random.default_rng(0).integers(1, VOCABULARY, (4, LENGTHS.max()), dtype=np.int32)


compressed = pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIGS["recommended"], id="recommended"),
        pytest.param(CONFIGS["published"], id="published", marks=pytest.mark.exhaustive),
    ],
)


def random_model(model_class: type[Llama], config: ModelConfig) -> Llama:
    """A model with weights large enough for every part of it to matter to the logits."""
    graph, state = nnx.split(model_class(config, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda weight: weight * 8 if weight.ndim > 1 else weight, state))


decode = jax.jit(decode_step)


class Context(NamedTuple):
    vocab_size: int
    max_position_embeddings: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["config"])
@dataclasses.dataclass
class Lookup:
    """A model without layers: the logits after a token are its row of a table [V, V]."""

    table: jax.Array
    config: Any

    @property
    def layers(self) -> Sequence[Layer]:
        return ()

    def embed(self, tokens):
        return self.table[tokens]

    def logits(self, hidden):
        return hidden

    def init_cache(self, config, *, batch, capacity):
        return ()


def always(logits: Sequence[float]) -> Lookup:
    """The same logits after every token."""
    table = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(logits), len(logits)))
    return Lookup(table, Context(len(logits), 1 << 20))


def counting(vocabulary: int = 100) -> Lookup:
    """After each token, the next one."""
    return Lookup(jnp.roll(jnp.eye(vocabulary), 1, axis=1), Context(vocabulary, vocabulary))


def stopped(tokens, eos_ids):
    """What a generation that stops should give, of one that does not: tokens and lengths."""
    tokens, lengths = np.array(tokens), []
    for row in tokens:
        stops = np.flatnonzero(np.isin(row, eos_ids))
        lengths.append(stops[0] + 1 if len(stops) else len(row))
        row[lengths[-1] :] = 0
    return tokens, lengths


class Compilations(logging.Handler):
    """Names of what is compiled while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if match := re.match(r"Finished XLA compilation of jit\((.*)\) in", record.getMessage()):
            self.names.append(match[1])

    def __enter__(self) -> list[str]:
        self.flag = jax.log_compiles()
        self.flag.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self.names

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("jax").removeHandler(self)
        self.flag.__exit__(*error)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["overflow"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Flag:
    """A cache that holds nothing but its flags."""

    overflow: jax.Array

    @property
    def batch(self) -> int:
        return len(self.overflow)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flagging:
    """A layer whose cache overflows when it is given `token` (of `counting`'s one-hot rows)."""

    token: int

    def prefill(self, hidden, cache, lengths, *, implementation=None):
        held = jnp.arange(hidden.shape[1]) < lengths[:, None]
        return hidden, Flag((held & (hidden[..., self.token + 1] > 0)).any(axis=1))

    def decode(self, hidden, cache, *, implementation=None):
        return hidden, Flag(cache.overflow | (hidden[:, self.token + 1] > 0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["config", "flags"])
@dataclasses.dataclass
class Overflowing(Lookup):
    """Counts, and some of its layers' caches overflow at a token each."""

    flags: tuple[Layer, ...]

    @property
    def layers(self):
        return self.flags

    def init_cache(self, config, *, batch, capacity):
        return tuple(Flag(jnp.zeros(batch, bool)) for _ in self.flags)
