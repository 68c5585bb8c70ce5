"""Tensors of a checkpoint, whatever its format."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint: its shape is known, its numbers are read when `read` is called."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
