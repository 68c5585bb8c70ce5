"""Entries as they are."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mustafar_jax.codecs.codec import Codec


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """Numbers of the cache's dtype, bit for bit."""

    @property
    def name(self) -> str:
        """See `Codec`."""
        return "plain numbers"

    @property
    def bits(self) -> None:
        """See `Codec`."""
        return None

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """See `Codec`."""
        return dtype

    def encode(
        self, x: jax.Array, dtype: np.dtype[Any], held: jax.Array | None = None, weight: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """See `Codec`."""
        return x.astype(dtype), None

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Codec`."""
        return codes


PLAIN = Plain()
