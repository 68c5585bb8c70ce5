"""What generations are timed: the models' shapes, and a case."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from benchmarks.attention_cases import RULES
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import DENSE
from mustafar_jax.models import ModelConfig, memory

DTYPE = jnp.bfloat16

_COMMON: dict[str, Any] = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "head_dim": 128}
SHAPES = {
    "llama-2-7b": ModelConfig(
        vocab_size=32000, intermediate_size=11008, num_kv_heads=32, max_position_embeddings=1 << 20, **_COMMON
    ),
    "llama-3-8b": ModelConfig(
        vocab_size=128256, intermediate_size=14336, num_kv_heads=8, max_position_embeddings=1 << 20,
        rope_theta=500000.0, **_COMMON,
    ),
    "qwen2.5-7b": ModelConfig(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
        head_dim=128, max_position_embeddings=1 << 20, rms_norm_eps=1e-6, rope_theta=1e6, attention_bias=True,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, max_position_embeddings=1 << 20, rope_theta=100000.0, tie_word_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
        max_position_embeddings=1 << 20,
    ),
}  # fmt: skip
"""The models' shapes; "tiny" is for trying the program where there is no GPU."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        shape: a name in `SHAPES`.
        context: tokens of each prompt.
        sparsity: of keys and values, where there is no preset; 0 is a dense cache.
        batch: prompts.
        implementation: of attention during decoding.
        largest: whether `batch` is the largest that the memory plan lets fit, or less where that did not.
        new_tokens: how long the prompts are continued; a multiple of 64, at least 128.
        rule: of pruning, a name in `attention_cases.RULES`.
        split: whether each part of a step is timed, for which it is compiled again.
        preset: the caches' config by its name, in place of a rule and a sparsity.
        filled: whether caches are filled with random rows in place of a prefill, which a large batch takes minutes for.
            The plan is that with a prefill all the same: the largest batch is one that can be prefilled.
        chunk: tokens of all prompts that are prefilled at a time, of which the plan knows nothing; None: prompts go in
            one piece.
    """

    shape: str
    context: int
    sparsity: float
    batch: int
    implementation: str | None
    largest: bool = False
    new_tokens: int = 256
    rule: str = "recommended"
    split: bool = True
    preset: str | None = None
    filled: bool = False
    chunk: int | None = None

    @property
    def compression(self) -> CompressionConfig:
        """The caches' config."""
        if self.preset:
            return CompressionConfig.preset(self.preset)
        return RULES[self.rule](self.sparsity, self.sparsity) if self.sparsity else DENSE

    @property
    def is_dense(self) -> bool:
        """Whether the caches are dense ones."""
        return self.compression.is_dense

    @property
    def capacity(self) -> int:
        """Tokens that a sequence's cache has room for."""
        return self.context + self.new_tokens

    @property
    def plan(self) -> memory.MemoryPlan:
        """What the case takes, as planned."""
        return memory.plan(SHAPES[self.shape], self.compression, batch=self.batch, capacity=self.capacity, dtype=DTYPE)

    @property
    def name(self) -> str:
        """Of the caches, and how they came about unless by a plain prefill."""
        caches = "dense" if self.is_dense else self.preset or f"{self.rule} {self.sparsity}"
        return caches + ", filled" * self.filled + (f", chunks of {self.chunk}" if self.chunk else "")

    def __str__(self) -> str:
        cache = self.name if self.is_dense else f"{self.name} ({self.implementation or 'best'})"
        return f"{self.shape}, {self.context:,} tokens, batch {self.batch}{' (largest)' * self.largest}, {cache}"


def case_of(row: dict[str, Any]) -> Case:
    """The case that a row is of; earlier rows lack some fields."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case) if field.name in row})


def setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows that are compared have in common; the largest batch is one with the same memory."""
    case = case_of(row)
    batch = ("largest", row["limit_bytes"]) if case.largest else case.batch
    return (case.shape, case.context, case.new_tokens, case.filled, case.chunk, batch)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs of the same case have in common."""
    case = case_of(row)
    return (*setting(row), case.compression, case.implementation)
