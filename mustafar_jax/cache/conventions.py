"""Whether a model rotates keys as a cache that centres them takes it: it rotates their mean back, and on again."""

import jax
import numpy as np
from jax.typing import ArrayLike

_ERROR = 0.02
"""Relative, of a pair of channels over all tokens: what 16-bit numbers and float32 angles may be off by."""

_PARTIAL = (
    "put half of the other channels behind each half of those that turn, in queries and keys, and zeros for them at "
    "the end of inv_freq"
)
_REMEDIES = {
    "interleaved": "permute queries and keys: jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)",
    "partial": _PARTIAL,
    "partial and interleaved": f"let even ones be the first half of those that turn, odd ones the second; {_PARTIAL}",
}


def check_rope(key: ArrayLike, rotated: ArrayLike, inv_freq: ArrayLike, positions: ArrayLike | None = None) -> None:
    """Check that keys are rotated by `inv_freq` in the half-split convention, which caches with centred keys need.

    Channel i pairs with channel i + H / 2, as in Hugging Face's Llama; RoPE is arXiv 2104.09864, section 3.4.2. Another
    convention gives no error elsewhere: the mean is then of little use, and keys are held less exactly. What turns by
    too little to be seen in these tokens is not found out; some hundred positions tell.

    Args:
        key: [B, S, K, H] before RoPE, any floating-point dtype; not traced.
        rotated: the same after RoPE, as the cache gets them: in half-split order, also where those before RoPE are not
            (channels 2 i and 2 i + 1 have become i and i + H / 2). All may be scaled by a constant.
        inv_freq: [H / 2], radians per position, as given to `LayerCache.init`.
        positions: int [S] or [B, S]; 0 .. S - 1 if None.

    Raises:
        ValueError: another convention, by its name (interleaved, partial, both), or other frequencies, and what to do;
            shapes that do not fit, positions at which nothing turns.
        TypeError: arrays that are traced, as under `jax.jit`.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (key, rotated, inv_freq, positions)):
        raise TypeError("check_rope takes no traced arrays: call it outside of jax.jit")
    before, after = (np.asarray(x).astype(np.float64) for x in (key, rotated))
    angles = _angles(before, after, np.asarray(inv_freq, np.float64), positions)
    channels, half = np.arange(before.shape[-1]), before.shape[-1] // 2
    found = _pairs(after / _factor(before, after), channels[:half], channels[half:])
    for first, second in _orders(before.shape[-1]).values():  # what was interleaved may have been permuted
        if _close(_pairs(before, first, second) * np.exp(1j * angles), found):
            return
    convention, turning = _convention(before, after, angles)
    if convention == "half-split":
        pair = int(np.argmax(_errors(_pairs(before, channels[:half], channels[half:]) * np.exp(1j * angles), found)))
        raise ValueError(f"rotated has turned by other angles than inv_freq tells, most of all pair {pair} of channels")
    if convention is None:
        raise ValueError("rotated follows no convention that is known here; the cache wants the half-split one")
    raise ValueError(
        f"rotated follows the {convention} convention, {turning} of {len(channels)} channels turn; the cache wants all "
        f"in the half-split one: {_REMEDIES[convention]}"
    )


def _angles(before: np.ndarray, after: np.ndarray, inv_freq: np.ndarray, positions: ArrayLike | None) -> np.ndarray:
    """[B or 1, S, 1, H / 2]; ValueError for shapes that do not fit."""
    if before.ndim != 4 or before.shape[-1] % 2 or before.shape != after.shape:
        raise ValueError(f"key has shape {before.shape}, rotated {after.shape}; wanted [B, S, K, H] of both, H even")
    batch, tokens, _, head_dim = before.shape
    if inv_freq.shape != (head_dim // 2,):
        raise ValueError(f"inv_freq has shape {inv_freq.shape}; wanted [{head_dim // 2}]")
    at = np.arange(tokens) if positions is None else np.asarray(positions)
    if at.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(f"positions has shape {at.shape}; wanted [{tokens}] or [{batch}, {tokens}]")
    if not at.any():
        raise ValueError("positions are all 0, where nothing turns; wanted some hundred")
    return np.atleast_2d(at)[..., None, None] * inv_freq


def _factor(before: np.ndarray, after: np.ndarray) -> float:
    """By how much keys have grown: rotation leaves lengths alone, YaRN scales what it rotates."""
    return float(np.linalg.norm(after) / max(np.linalg.norm(before), np.finfo(np.float64).tiny)) or 1.0


def _orders(turning: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which of the first channels are pairs, by convention."""
    channels = np.arange(turning)
    return {
        "half-split": (channels[: turning // 2], channels[turning // 2 :]),
        "interleaved": (channels[::2], channels[1::2]),
    }


def _convention(before: np.ndarray, after: np.ndarray, angles: np.ndarray) -> tuple[str | None, int]:
    """The convention, and how many channels turn: rotation leaves the length of each pair alone."""
    head_dim = before.shape[-1]
    moved = np.flatnonzero((before != after).reshape(-1, head_dim).any(axis=0))
    turning = int(moved[-1]) + 1 if len(moved) else 0
    turning += turning % 2
    seen = 2 * int((np.abs(angles).reshape(-1, angles.shape[-1]).max(axis=0) > _ERROR).sum())
    scaled = after / _factor(before, after)
    for size in (head_dim, turning) if turning >= seen else (turning,):  # a pair that turns too little may look still
        for name, (first, second) in _orders(size).items():
            if size and _close(*(np.abs(_pairs(x, first, second)) for x in (before, scaled))):
                partial = {"half-split": "partial", "interleaved": "partial and interleaved"}
                return (name if size == head_dim else partial[name]), size
    return None, turning


def _pairs(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pairs of channels as complex numbers [..., pairs]."""
    return np.asarray(x[..., first] + 1j * x[..., second])


def _errors(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[pairs], relative."""
    axes = tuple(range(expected.ndim - 1))
    off, size = (np.sqrt((np.abs(x) ** 2).sum(axis=axes)) for x in (expected - found, expected))
    return off / np.maximum(size, np.finfo(np.float64).tiny)


def _close(expected: np.ndarray, found: np.ndarray) -> bool:
    return bool((_errors(expected, found) < _ERROR).all())
