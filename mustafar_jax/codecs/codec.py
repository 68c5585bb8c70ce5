"""What a codec does."""

import abc
from typing import Any

import jax
import numpy as np


class Codec(abc.ABC):
    """How the entries of a row are coded. Hashable: static under `jax.jit`."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """In words, for messages."""

    @property
    @abc.abstractmethod
    def bits(self) -> int | None:
        """Bits of a code; None where entries are ordinary numbers."""

    @abc.abstractmethod
    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype of decoded entries, where those that were encoded had another."""

    @abc.abstractmethod
    def encode(
        self, x: jax.Array, dtype: np.dtype[Any], held: jax.Array | None = None, weight: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Code rows, of whole groups of 32 tokens.

        Args:
            x: [..., S, H] of `dtype`, or float32 where it has not been rounded to that yet.
            dtype: of the vectors.
            held: bool [..., S, H], which entries will be kept, so that the others do not count; None counts all.
            weight: float32, broadcasts against x: how much an error in each entry matters; None for all alike.

        Returns:
            Codes [..., S, H]: numbers of `dtype`, or uint8 below 2**bits; and scales [..., S], or None.
        """

    @abc.abstractmethod
    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """The entries [..., S, n] that codes [..., S, n] with scales [..., S] stand for."""

    def nbytes(self, held: int, entries: int) -> int:
        """Bytes that rows count for: those `held`, unless the codec simulates another of so many entries."""
        return held
