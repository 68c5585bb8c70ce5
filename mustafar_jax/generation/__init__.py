"""Text from a model through its layers' caches: prefill and decode, sampling, streaming, scoring."""

from mustafar_jax.generation.checks import DENSE
from mustafar_jax.generation.conversation import Conversation, chat
from mustafar_jax.generation.loop import STEPS_PER_CHECK, Generation, generate, stream
from mustafar_jax.generation.prefill import PREFILL_TOKENS, extend_prompt, prefill_prompt
from mustafar_jax.generation.programs import keep_programs, padded
from mustafar_jax.generation.protocols import Caches, Layer, Model, Progress
from mustafar_jax.generation.scoring import log_likelihoods
from mustafar_jax.generation.state import decode_step

__all__ = [
    "DENSE",
    "PREFILL_TOKENS",
    "STEPS_PER_CHECK",
    "Caches",
    "Conversation",
    "Generation",
    "Layer",
    "Model",
    "Progress",
    "chat",
    "decode_step",
    "extend_prompt",
    "generate",
    "keep_programs",
    "log_likelihoods",
    "padded",
    "prefill_prompt",
    "stream",
]
