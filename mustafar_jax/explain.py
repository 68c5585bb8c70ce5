"""Which backend would do what for a cache on this device, and why the better ones cannot."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mustafar_jax.attention import check_window, decode_operands
from mustafar_jax.backend import OperationName
from mustafar_jax.backends import registry
from mustafar_jax.cache import DenseCache, LayerCache, PackedCache
from mustafar_jax.cache.base import check_cache
from mustafar_jax.operands import PromptAttention


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found, which a prompt shows and `print` prints.

    Attributes:
        device: where jax computes unless told otherwise.
        steps: by step ("prefill", "pack", "decode"), for each backend that does such a thing, best first: why it
            cannot do it here, or None. The first with None is taken.
    """

    device: str
    steps: dict[str, dict[str, str | None]]

    def taken(self, step: str) -> str:
        """The backend that a step takes."""
        return next(name for name, reason in self.steps[step].items() if reason is None)

    def __repr__(self) -> str:
        """A line a step, and one for each better backend that cannot do it."""
        lines = [f"on {self.device}:"]
        for step, reasons in self.steps.items():
            lines.append(f"  {step:8}{self.taken(step)}")
            for name, reason in reasons.items():
                if reason is None:
                    break
                lines.append(f"          not {name}: {reason}")
        return "\n".join(lines)


def explain(cache: LayerCache, *, num_heads: int | None = None, sliding_window: int | None = None) -> Explanation:
    """Say which backend would attend prompts, pack and decode with such a cache here, and why the better ones cannot.

    Args:
        cache: the cache, or its shapes, as `jax.eval_shape` gives them.
        num_heads: query heads of the model, a multiple of the KV heads; as many as these if None.
        sliding_window: of the model; none if None.

    Raises:
        ValueError: num_heads that is no multiple of the KV heads, sliding_window < 1.
        TypeError: no cache.
    """
    check_cache(cache)
    check_window(sliding_window)
    heads: Any = cache.num_kv_heads if num_heads is None else num_heads
    if not isinstance(heads, int) or heads < 1 or heads % cache.num_kv_heads:
        raise ValueError(f"{num_heads=} must be a multiple of the cache's {cache.num_kv_heads} KV heads")
    steps: dict[str, dict[str, str | None]] = {}

    def look(cache: LayerCache) -> None:
        """Shapes suffice: this is traced, never run."""
        scale = 1 / math.sqrt(cache.head_dim)

        def zeros(*sizes: int) -> jax.Array:
            return jnp.zeros((cache.batch, *sizes, cache.head_dim), cache.dtype)

        prompt, entries = zeros(cache.capacity, heads), zeros(cache.capacity, cache.num_kv_heads)
        operands = PromptAttention(prompt, entries, entries, scale, sliding_window)
        steps["prefill"] = registry.reasons("attend_prompt", operands)
        if isinstance(cache, PackedCache):
            leaving = cache.oldest(cache.packed_lengths, cache.packed_lengths)
            steps["pack"] = registry.reasons("pack", cache.packing(leaving))
        query = zeros(cache.num_kv_heads, heads // cache.num_kv_heads)
        operation: OperationName = "attend_dense" if isinstance(cache, DenseCache) else "attend_packed"
        steps["decode"] = registry.reasons(operation, decode_operands(query, cache, scale, sliding_window))

    jax.eval_shape(look, cache)
    return Explanation(str(registry.default_device()), steps)
