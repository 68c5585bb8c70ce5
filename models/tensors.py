"""Tensors of a checkpoint, whatever its format: what each is called, and which are the same numbers."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# A tensor of every checkpoint: what stands before it is the prefix of all.
_ANCHOR = "layers.0.input_layernorm.weight"
# Non-weights that checkpoints carry: RoPE's frequencies, and its table, which follow from the config.
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|^rope\.freqs$")
_PARTS = frozenset({"embed_tokens", "layers", "norm"})
# What PyTorch's wrappers put into names: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint: its shape is known, its numbers are read when `read` is called.

    Attributes:
        shape: of the whole.
        read: gives it.
        part: gives what slices of it hold, one an axis, without reading the rest; None where it must be read whole.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    part: Callable[[tuple[slice, ...]], np.ndarray] | None = None

    def read_part(self, index: tuple[slice, ...]) -> np.ndarray:
        """What slices of it hold, one an axis; ValueError where it is of another shape than was announced."""
        if self.part is not None:
            return self.part(index)
        whole = self.read()
        if whole.shape != tuple(self.shape):
            raise ValueError(f"a tensor was announced with shape {tuple(self.shape)} and read with {whole.shape}")
        return whole[index]


def is_harmless(name: str) -> bool:
    """Whether a tensor of this name is no weight, and may be left unread."""
    return bool(_HARMLESS.search(name))


def with_usual_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Call tensors as transformers' models with a head do: "model.layers.0. ...", "lm_head.weight".

    Models saved without their head lack the "model."; wrappers of PyTorch put parts of their own into names, or before
    all of them ("module.", "_orig_mod.", "base_model.model."). Names come back as they are where it is not plain what
    they stand for.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in tensors}
    anchors = [name.removesuffix(_ANCHOR) for name in plain.values() if name.endswith(_ANCHOR)]
    if len(anchors) != 1:
        return dict(tensors)
    usual = {_usual_name(name, anchors[0]): tensors[original] for original, name in plain.items()}
    return usual if len(usual) == len(tensors) else dict(tensors)


def _usual_name(name: str, prefix: str) -> str:
    if name.endswith(HEAD) and prefix.startswith(name.removesuffix(HEAD)):
        return HEAD
    inner = name.removeprefix(prefix)
    return f"model.{inner}" if name.startswith(prefix) and inner.split(".")[0] in _PARTS else name
