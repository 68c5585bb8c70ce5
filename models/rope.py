"""Rotary frequencies: how checkpoints say that they are stretched for longer contexts, and what follows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mustafar_jax.models.fields import Field, is_above_zero, length

DEFAULT_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    `kind` is "linear" (every frequency divided by `factor`) or "llama3" (Llama 3.1: only the low frequencies are,
    with a smooth passage between the two wavelengths that the other fields set).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind={self.kind!r} is not a known rope scaling: linear or llama3 is wanted")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if not is_above_zero(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r} must be a number above 0")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor!r} must be below high_freq_factor={self.high_freq_factor!r}"
            )


def frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """The rotary frequencies of one head: float64 [head_dim / 2], radians per position."""
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return plain
    kept = 0.0 if scaling.kind == "linear" else _llama3_kept_share(plain, scaling)
    return plain * (kept + (1 - kept) / scaling.factor)


def _llama3_kept_share(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency is not scaled: 0 for those that turn rarely in the original context, 1 for others."""
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    return np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)


# What config.json says

_NUMBER = Field("a number above 0", is_above_zero)
_KINDS: Mapping[str, Mapping[str, Field]] = {
    "default": {},
    "linear": {"factor": _NUMBER},
    "llama3": {
        "factor": _NUMBER,
        "low_freq_factor": _NUMBER,
        "high_freq_factor": _NUMBER,
        "original_max_position_embeddings": length(),
    },
}
"""The fields that each `rope_type` computes with."""


def rope_problems(fields: Mapping[str, Any]) -> list[str]:
    """What of a config.json's rotary embedding is not supported, in words; the fields have their defaults."""
    objects = [name for name in ("rope_scaling", "rope_parameters") if fields.get(name) is not None]
    if wrong := [name for name in objects if not isinstance(fields[name], Mapping)]:
        return [f"{name}={fields[name]!r} must be an object" for name in wrong]
    filled = [fields[name] for name in objects if fields[name]]
    if len(filled) == 2 and filled[0] != filled[1]:
        return [f"rope_scaling={filled[0]} and rope_parameters={filled[1]} differ, supported: one of them"]
    rope = _rope_fields(fields)
    problems = [
        f"{name} is an object within the rotary embedding's, supported: one rotary embedding for all layers"
        for name, value in rope.items()
        if isinstance(value, Mapping)
    ]
    kind, share = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    if share is not None and (share != 1.0 or isinstance(share, bool)):
        problems.append(f"partial_rotary_factor={share!r}, supported: 1.0")
    if not isinstance(kind, str) or kind not in _KINDS:
        return [*problems, f"rope_type={kind!r}, supported: {', '.join(map(repr, _KINDS))}"]
    checks = {"rope_theta": _NUMBER, **_KINDS[kind]}
    found = [field.problem(name, rope, where=f" beside rope_type={kind!r}") for name, field in checks.items()]
    return problems + [problem for problem in found if problem is not None]


def read_rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the frequencies, and how they are stretched, of a config.json without `rope_problems`."""
    rope = _rope_fields(fields)
    theta, kind = float(rope["rope_theta"]), rope["rope_type"]
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, float(rope["factor"]))
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return theta, RopeScaling(kind, float(rope["factor"]), low, high, rope["original_max_position_embeddings"])


def _rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's fields in transformers 5's spelling, whichever the file uses, and wherever they stand.

    What stands in the object wins over the top level, but for the length of the original context.
    """
    outer = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    rope = {"rope_theta": DEFAULT_THETA, **outer, **(fields.get("rope_scaling") or fields.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.get("type", "default"))
    original = "original_max_position_embeddings"
    rope[original] = fields.get(original, rope.get(original, fields.get("max_position_embeddings")))
    return rope
