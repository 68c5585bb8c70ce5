"""What a codec does."""

import abc
from typing import Any

import jax
import numpy as np


class Codec(abc.ABC):
    """How the entries of a row are coded. Hashable: static under `jax.jit`.

    A row has n entries: all H of a vector, or those that a bitmap names, in the row's slots. Rows come in whole groups
    of 32 tokens.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """In words, for messages."""

    @abc.abstractmethod
    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype of decoded entries, where those that were encoded had another."""

    @abc.abstractmethod
    def encode(self, entries: jax.Array, dtype: np.dtype[Any]) -> tuple[jax.Array, jax.Array | None]:
        """Code rows.

        Args:
            entries: [..., S, n] of `dtype`, or float32 where they have not been rounded to it yet.
            dtype: of the vectors.

        Returns:
            Codes [..., S, n], and scales [..., S] or None. A row of zeros has codes that decode to zeros.
        """

    @abc.abstractmethod
    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """The entries [..., S, n] of codes and scales."""

    def nbytes(self, held: int, entries: int) -> int:
        """Bytes that rows count for: those `held`, unless the codec simulates another of so many entries."""
        return held
