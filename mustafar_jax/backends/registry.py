"""All backends, and which of them is taken."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mustafar_jax.backends.cudnn import CUDNN
from mustafar_jax.backends.record import Backend, Operation, OperationName
from mustafar_jax.backends.xla.backend import XLA
from mustafar_jax.pallas_kernels.mosaic.backend import MOSAIC_GPU
from mustafar_jax.pallas_kernels.triton.backend import TRITON

BACKENDS = {backend.name: backend for backend in (CUDNN, MOSAIC_GPU, TRITON, XLA)}
"""Every backend by its name; where several can run something, the first one is the best."""

IMPLEMENTATIONS = tuple(BACKENDS)
"""Every name that `implementation` takes."""

Implementation = str | Sequence[str] | None
Names = str | tuple[str, ...]

_log = logging.getLogger("mustafar_jax")


class Candidates(NamedTuple):
    """Backends to try, in order. Hashable: static under `jax.jit`, whose trace must not look for devices.

    Attributes:
        names: of those that are present, or of the one that was named alone.
        absent: why others are not among them, "name: reason" each.
    """

    names: tuple[str, ...]
    absent: tuple[str, ...] = ()


def check_implementation(implementation: Implementation) -> Names | None:
    """The argument in a hashable form; ValueError for a name that is not in `IMPLEMENTATIONS`, or for none."""
    if implementation is None or isinstance(implementation, str):
        names: tuple[Any, ...] = () if implementation is None else (implementation,)
    else:
        names = implementation = tuple(implementation)
        if not names:
            raise ValueError("implementation=() names none; wanted at least one name, or None")
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"implementation={name!r} must be one of {IMPLEMENTATIONS}")
    return implementation


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
    able = tuple(name for name, backend in BACKENDS.items() if backend.operation(operation))
    absent = {name: reason for name in names or able if (reason := _why_absent(BACKENDS[name]))}
    reasons = tuple(f"{name}: {reason}" for name, reason in absent.items())
    present = tuple(name for name in names or able if name not in absent)
    if not present:
        raise NotImplementedError(_refusal(operation, reasons))
    return Candidates(present, reasons)


def run(operation: OperationName, operands: Any, chosen: Candidates) -> Any:
    """Compute by the first candidate that can.

    Raises:
        NotImplementedError: none can, with every candidate's reason.
    """
    reasons = list(chosen.absent)
    for name in chosen.names:
        able = BACKENDS[name].operation(operation)
        reason = _why_not(BACKENDS[name], able, operation, operands)
        if able and reason is None:
            try:
                result = able.run(operands)
            except NotImplementedError as error:
                reason = str(error)
            else:
                _tell(operation, name, _describe(operands), tuple(reasons))
                return result
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(_refusal(operation, tuple(reasons)))


def why_not(name: str, operation: OperationName, operands: Any) -> str | None:
    """Why a backend cannot run an operation on these operands, wherever it is; None where nothing speaks against it."""
    backend = BACKENDS[name]
    return _why_not(backend, backend.operation(operation), operation, operands)


def reasons(operation: OperationName, operands: Any) -> dict[str, str | None]:
    """For each backend that does such a thing, best first: why it cannot do this here, or None."""
    return {
        name: _why_absent(backend) or why_not(name, operation, operands)
        for name, backend in BACKENDS.items()
        if backend.operation(operation)
    }


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


def _why_not(backend: Backend, able: Operation[Any, Any] | None, operation: OperationName, operands: Any) -> str | None:
    if able is None:
        others = [name for name, other in BACKENDS.items() if other.operation(operation)]
        return f"implementation={backend.name!r} does not {_WORDS[operation]}; wanted one of {others}"
    return able.why_not(operands)


_WORDS: dict[OperationName, str] = {
    "attend_prompt": "attend prompts",
    "attend_dense": "attend dense caches",
    "attend_packed": "attend packed caches",
    "pack": "prune and pack",
    "multiply": "multiply with stored rows",
}


def _refusal(operation: OperationName, reasons: tuple[str, ...]) -> str:
    if len(reasons) == 1:
        return reasons[0].partition(": ")[2]
    return f"no implementation can {_WORDS[operation]} here: " + "; ".join(reasons)


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
def _tell(operation: OperationName, name: str, shapes: str, reasons: tuple[str, ...]) -> None:
    passed = f"; passed over {'; '.join(reasons)}" if reasons else ""
    _log.info("%s by %s: %s%s", operation, name, shapes, passed)
