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

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """See `Codec`."""
        return dtype

    def encode(self, entries: jax.Array, dtype: np.dtype[Any]) -> tuple[jax.Array, None]:
        """See `Codec`."""
        return entries.astype(dtype), None

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Codec`."""
        return codes


PLAIN = Plain()
