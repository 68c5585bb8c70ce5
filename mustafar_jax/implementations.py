"""Who computes what: names of implementations, and which of them is taken."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
    """Whether jax computes on an NVIDIA GPU unless told otherwise, as by `jax.default_device`."""
    return "cuda" in _default_device().client.platform_version


def _default_device() -> jax.Device:
    given = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(given, str):
        return jax.devices(given)[0]
    return jax.devices()[0] if given is None else given


def kernels(module: str) -> Any:
    """The module `mustafar_jax.pallas_kernels.<module>`, imported when first used: Pallas takes a while to import.

    Raises:
        NotImplementedError: it cannot be imported. Pallas's backends are experimental: a version of jax may lack one.
    """
    try:
        return importlib.import_module(f"mustafar_jax.pallas_kernels.{module}")
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"the kernels of {module} cannot be imported: {error}") from error


def kernels_or_xla() -> tuple[str, ...]:
    """What None tries on the default device where there are Triton kernels for it, best first."""
    return ("triton", "xla") if on_cuda() else ("xla",)


def _check_present(name: str) -> None:
    """Raise NotImplementedError for what only lowering would find out: a backend named alone may be for elsewhere."""
    if name != "xla" and not on_cuda():
        raise NotImplementedError(
            f"implementation={name!r} needs an NVIDIA GPU; the default device is {_default_device()}"
        )
