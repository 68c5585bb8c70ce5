"""How a cache is compressed."""

import dataclasses
from typing import Any, Self

import numpy as np

from mustafar_jax.bitmap import WORD
from mustafar_jax.pruning import METHODS, check_sparsity, keep_count


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """What a KV cache drops and what it keeps dense. Hashable: static under `jax.jit`.

    The defaults are the published rule (arXiv 2505.22913, section 3): per-token magnitude, a dense window of the 32
    most recent tokens. `recommended` turns on what keeps a model's output closer to dense at the same sparsity.

    Attributes:
        k_sparsity, v_sparsity: the fraction of each key or value vector that is removed, in [0, 1); 0 keeps that
            cache dense.
        k_method, v_method: the rule that scores entries, a name in `pruning.METHODS`.
        residual_length: the most recent tokens that are always dense.
        group: tokens that are pruned and packed at once, a multiple of 32.
        sink_tokens: the first tokens of a sequence that stay dense.
        center_keys: keep the entries of a key that differ most from its sequence's mean key, rotated to the token's
            position, and let that mean stand for the others. Needs the model's RoPE frequencies, in Hugging Face's
            half-split convention. Without effect where keys are dense, and for a prompt of at most sink_tokens +
            residual_length tokens, which has no mean.
        rescale_values: scale what is kept of a value vector to the whole vector's L2 norm.

    Raises:
        ValueError: a field out of its range, naming it.
        TypeError: a field of another type, naming it.
    """

    k_sparsity: float = 0.7
    v_sparsity: float = 0.7
    k_method: str = "magnitude"
    v_method: str = "magnitude"
    residual_length: int = 32
    group: int = 32
    sink_tokens: int = 0
    center_keys: bool = False
    rescale_values: bool = False

    def __post_init__(self) -> None:
        for name in ("k_sparsity", "v_sparsity"):
            if not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a Python number")
            check_sparsity(name, getattr(self, name))
        for name in ("k_method", "v_method"):
            if getattr(self, name) not in METHODS:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {sorted(METHODS)}")
        for name in ("residual_length", "group", "sink_tokens"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise TypeError(f"{name}={getattr(self, name)!r} must be an integer")
        for name in ("residual_length", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.group < WORD or self.group % WORD:
            raise ValueError(f"group={self.group} must be a positive multiple of {WORD}")

    @classmethod
    def recommended(cls, k_sparsity: float = 0.7, v_sparsity: float = 0.7, **fields: Any) -> Self:
        """The published rule plus dense sink tokens, centred keys and rescaled values; `fields` override."""
        chosen = {"sink_tokens": 4, "center_keys": True, "rescale_values": True} | fields
        return cls(k_sparsity=k_sparsity, v_sparsity=v_sparsity, **chosen)

    @property
    def is_dense(self) -> bool:
        """Whether neither keys nor values are pruned: an ordinary dense cache."""
        return self.k_sparsity == 0 and self.v_sparsity == 0

    def packed_tokens(self, length: Any) -> Any:
        """Of a sequence's first `length` tokens, how many are packed; int or integer array, as `length` is.

        They follow the sinks, come in whole groups, and leave at least `residual_length` tokens dense behind them.
        """
        groups = (length - self.sink_tokens - self.residual_length) // self.group
        return groups * (groups > 0) * self.group

    def true_sparsity(self, head_dim: int) -> tuple[float, float]:
        """The fractions of packed keys and values that are really removed, after `keep_count` has rounded."""
        keys, values = (
            1 - keep_count(head_dim, sparsity) / head_dim for sparsity in (self.k_sparsity, self.v_sparsity)
        )
        return max(keys, 0.0), max(values, 0.0)  # a head_dim that is no multiple of 4 is rounded up to one
