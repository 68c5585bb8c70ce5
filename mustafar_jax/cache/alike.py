"""What a cache is besides what it holds, and in what two differ."""

import dataclasses
from typing import Any

import numpy as np

from mustafar_jax.cache.base import STATIC, LayerCache


def kind_of(cache: LayerCache) -> dict[str, Any]:
    """What a cache is, besides its arrays, as JSON has it: names and what they are."""
    sizes = {name: getattr(cache, name) for name in STATIC if name not in ("config", "dtype")}
    queries = getattr(cache, "queries", None)
    return {
        "config": dataclasses.asdict(cache.config),
        "batch": int(cache.batch),
        "num_kv_heads": int(cache.num_kv_heads),
        **{name: int(size) for name, size in sizes.items()},
        "dtype": np.dtype(cache.dtype).name,
        "num_heads": None if queries is None else int(queries.shape[1]),
        "inv_freq": None if (inv_freq := getattr(cache, "inv_freq", None)) is None else list(inv_freq),
    }


def difference(name: str, found: Any, wanted: Any) -> str:
    """In words, that one of the things that `kind_of` tells is another than wanted."""
    if name == "config" and isinstance(found, dict):
        fields = {field: (found.get(field), value) for field, value in wanted.items() if found.get(field) != value}
        told = ", ".join(f"{field}={one!r} instead of {other!r}" for field, (one, other) in fields.items())
        return f"config has {told or found}"
    if name == "inv_freq":
        return "inv_freq differs: these are keys of a model with other RoPE frequencies"
    return f"{name}={found!r}, wanted {wanted!r}"
