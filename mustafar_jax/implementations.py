"""Who computes what: names of implementations, and which of them is taken."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

T = TypeVar("T")

IMPLEMENTATIONS = ("mosaic_gpu", "triton", "cudnn", "xla")
"""Every name that `implementation` takes."""

Implementation = str | Sequence[str] | None
Names = str | tuple[str, ...]


def check_implementation(implementation: Implementation) -> Names | None:
    """The argument in a hashable form; ValueError for a name that is not in `IMPLEMENTATIONS`, or for none."""
    if implementation is None or isinstance(implementation, str):
        names: tuple[str, ...] = () if implementation is None else (implementation,)
    else:
        names = implementation = tuple(implementation)
        if not names:
            raise ValueError("implementation=() names none; wanted at least one name, or None")
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation={name!r} must be one of {IMPLEMENTATIONS}")
    return implementation


def first_that_runs(names: Names, run: Callable[[str], T]) -> T:
    """Try implementations in order; the last one's NotImplementedError is the caller's."""
    names = (names,) if isinstance(names, str) else names
    for name in names[:-1]:
        try:
            _check_present(name)
            return run(name)
        except NotImplementedError:
            continue
    return run(names[-1])


def on_cuda() -> bool:
    """Whether jax computes on an NVIDIA GPU unless told otherwise."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version


def kernels_or_xla() -> tuple[str, ...]:
    """What None tries on the default backend where there are Triton kernels for it, best first."""
    return ("triton", "xla") if on_cuda() else ("xla",)


def _check_present(name: str) -> None:
    """Raise NotImplementedError for what only lowering would find out: a backend named alone may be for elsewhere."""
    if name != "xla" and not on_cuda():
        raise NotImplementedError(
            f"implementation={name!r} needs an NVIDIA GPU; the default backend is {jax.default_backend()}"
        )
