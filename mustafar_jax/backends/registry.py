"""All backends, and which of them is taken."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mustafar_jax.backend import Backend, OperationName
from mustafar_jax.backends.cudnn import CUDNN
from mustafar_jax.backends.xla.backend import XLA
from mustafar_jax.pallas_kernels.mosaic.backend import MOSAIC_GPU
from mustafar_jax.pallas_kernels.triton.backend import TRITON

BACKENDS = {backend.name: backend for backend in (CUDNN, MOSAIC_GPU, TRITON, XLA)}
"""Every backend by its name; where several can run something, the first one is the best."""

IMPLEMENTATIONS = tuple(BACKENDS)
"""Every name that `implementation` takes."""

Implementation = str | Sequence[str] | None
Names = str | tuple[str, ...]

Reason = tuple[str, str]
"""A backend's name, and why it cannot run something."""

_log = logging.getLogger("mustafar_jax")


class Candidates(NamedTuple):
    """Backends to try, in order. Hashable: static under `jax.jit`, whose trace must not look for devices.

    Attributes:
        names: of those that are present, or of the one that was named alone.
        absent: others, and why they are not among them.
    """

    names: tuple[str, ...]
    absent: tuple[Reason, ...] = ()


def check_implementation(implementation: Any) -> Names | None:
    """The argument, an `Implementation`, in a hashable form.

    Raises ValueError for a name that is not in `IMPLEMENTATIONS`, or for no name; TypeError for what holds no names.
    """
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{implementation=} must be a name, a sequence of names, or None")
    if not all(names) or not names:
        raise ValueError(f"{implementation=} names none; wanted at least one name, or None")
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"implementation={name!r} must be one of {IMPLEMENTATIONS}")
    return implementation if isinstance(implementation, str) else tuple(names)


def candidates(operation: OperationName, implementation: Implementation) -> Candidates:
    """What to try for an operation: the one that is named alone; or, of several or of all, those that are present.

    One that is named alone may be meant for another device than this process has: it is traced all the same.

    Raises:
        ValueError: an unknown implementation.
        NotImplementedError: none of several is present, with every reason.
    """
    names = check_implementation(implementation)
    if isinstance(names, str):
        return Candidates((names,))
    wanted = names or _able(operation)
    absent = {name: reason for name in wanted if (reason := _why_absent(BACKENDS[name]))}
    present = tuple(name for name in wanted if name not in absent)
    if not present:
        raise NotImplementedError(_refusal(operation, list(absent.items())))
    return Candidates(present, tuple(absent.items()))


def preferring(operation: OperationName, implementation: Implementation) -> Candidates:
    """What to try for a part of a larger work: what is named and does such a thing, then the others that are present.

    "xla" alone is nothing but that.

    Raises:
        ValueError: an unknown implementation.
    """
    names = check_implementation(implementation)
    if names == "xla":
        return Candidates(("xla",))
    named, able = (names,) if isinstance(names, str) else names or (), _able(operation)
    others = [name for name in able if name not in named]
    absent = {name: reason for name in others if (reason := _why_absent(BACKENDS[name]))}
    order = [name for name in named if name in able] + [name for name in others if name not in absent]
    return Candidates(tuple(order), tuple(absent.items()))


def run(operation: OperationName, operands: Any, chosen: Candidates) -> Any:
    """Compute by the first candidate that can.

    Raises:
        NotImplementedError: none can, with every candidate's reason.
    """
    passed = list(chosen.absent)
    for name in chosen.names:
        reason = why_not(name, operation, operands)
        if reason is None:
            able = BACKENDS[name].operation(operation)
            assert able is not None
            try:
                result = able.run(operands)
            except NotImplementedError as error:
                reason = str(error)
            else:
                _tell(operation, name, _describe(operands), tuple(passed))
                return result
        passed.append((name, reason))
    raise NotImplementedError(_refusal(operation, passed))


def why_not(name: str, operation: OperationName, operands: Any) -> str | None:
    """Why a backend cannot run an operation on these operands, wherever it is; None where nothing speaks against it."""
    able = BACKENDS[name].operation(operation)
    if able is None:
        wanted = list(_able(operation))
        return f"implementation={name!r} does not {_WORDS[operation]}; wanted one of {wanted}"
    return able.why_not(operands)


def reasons(operation: OperationName, operands: Any) -> dict[str, str | None]:
    """For each backend that does such a thing, best first: why it cannot do this here, or None."""
    found = {}
    for name in _able(operation):
        both = _why_absent(BACKENDS[name]), why_not(name, operation, operands)
        found[name] = "; ".join(reason for reason in both if reason) or None
    return found


def packers(implementation: Implementation) -> Names | None:
    """The implementation of `prefill` and `append` that goes with one named for attention.

    The names among them that prune and pack, in their order; None, the best that works here, where none does. So "xla"
    is XLA for both, "triton" Triton for both (or NotImplementedError, as everywhere for a name alone), and "cudnn" and
    "mosaic_gpu", which attend alone, leave packing to what is best.

    Raises:
        ValueError: an unknown implementation.
    """
    names = check_implementation(implementation)
    if names is None:
        return None
    if isinstance(names, str):
        return names if BACKENDS[names].pack else None
    return tuple(name for name in names if BACKENDS[name].pack) or None


def on_cuda() -> bool:
    """Whether jax computes on an NVIDIA GPU unless told otherwise, as by `jax.default_device`."""
    return "cuda" in default_device().client.platform_version


def default_device() -> jax.Device:
    """Where jax computes unless told otherwise."""
    given = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(given, str):
        return jax.devices(given)[0]
    return jax.devices()[0] if given is None else given


def _why_absent(backend: Backend) -> str | None:
    if backend.needs_cuda and not on_cuda():
        return f"it needs an NVIDIA GPU; the default device is {default_device()}"
    return None


def _able(operation: OperationName) -> tuple[str, ...]:
    """The backends that do such a thing, best first."""
    return tuple(name for name, backend in BACKENDS.items() if backend.operation(operation))


_WORDS: dict[OperationName, str] = {
    "attend_prompt": "attend prompts",
    "attend_dense": "attend dense caches",
    "attend_packed": "attend packed caches",
    "pack": "prune and pack",
    "multiply": "multiply with stored rows",
}


def _refusal(operation: OperationName, passed: Sequence[Reason]) -> str:
    return f"no implementation can {_WORDS[operation]} here: {_join(passed)}"


def _join(passed: Sequence[Reason]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in passed)


def _describe(operands: Any) -> str:
    """The shapes and dtypes of what is given, in a line."""
    fields = {field.name: _arrays(getattr(operands, field.name)) for field in dataclasses.fields(operands)}
    return ", ".join(f"{name} {' '.join(arrays)}" for name, arrays in fields.items() if arrays)


def _arrays(value: Any) -> list[str]:
    """Of arrays, those within others too, of more than one axis: dtype and shape."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in _arrays(each)]
    return [f"{value.dtype}{list(value.shape)}"] if getattr(value, "ndim", 0) > 1 else []


@functools.lru_cache(maxsize=4096)  # a shape is told once, not in every layer
def _tell(operation: OperationName, name: str, shapes: str, passed: tuple[Reason, ...]) -> None:
    others = f"; passed over {_join(passed)}" if passed else ""
    _log.info("%s by %s: %s%s", operation, name, shapes, others)
