"""CUDA kernels as a process launches them, seen through CUPTI: machine code, grid and parameters.

Written against the headers of CUDA 13, whose structures have been the same since CUDA 12.
"""

import contextlib
import ctypes
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

_DRIVER_API, _RESOURCE = 1, 3
_LAUNCH, _LAUNCH_EX = (307, 442), (652, 653)
"""cuLaunchKernel and cuLaunchKernelEx, each also with per-thread streams."""
_MODULE_LOADED = 6
_ENTER = 0


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        name: of the kernel in its cubin.
        grid, block: sizes along three axes.
        shared: bytes of dynamic shared memory.
        params: the bytes of each parameter.
    """

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    params: list[bytes]


class _Api(ctypes.Structure):
    """CUpti_CallbackData."""

    _fields_ = [
        ("site", ctypes.c_int),
        ("function", ctypes.c_char_p),
        ("params", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
    ]


class _Resource(ctypes.Structure):
    """CUpti_ResourceData."""

    _fields_ = [("context", ctypes.c_void_p), ("handle", ctypes.c_void_p), ("descriptor", ctypes.c_void_p)]


class _Module(ctypes.Structure):
    """CUpti_ModuleResourceData."""

    _fields_ = [("id", ctypes.c_uint32), ("size", ctypes.c_size_t), ("cubin", ctypes.c_void_p)]


_Sizes = ctypes.c_uint * 7
"""Of the grid, of a block, and of its shared memory: how CUlaunchConfig begins."""


class _Launch(ctypes.Structure):
    """cuLaunchKernel_params."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("sizes", _Sizes),
        ("stream", ctypes.c_void_p),
        ("params", ctypes.POINTER(ctypes.c_void_p)),
    ]


class _LaunchEx(ctypes.Structure):
    """cuLaunchKernelEx_params."""

    _fields_ = [
        ("sizes", ctypes.POINTER(_Sizes)),
        ("function", ctypes.c_void_p),
        ("params", ctypes.POINTER(ctypes.c_void_p)),
    ]


class Recorder:
    """Keeps all cubins that are loaded and all launches from now on.

    Attributes:
        launches: in order.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._cubins: list[bytes] = []
        self._cuda, cupti = ctypes.CDLL("libcuda.so.1"), _library()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
        self._callback = kind(self._called)  # kept, for CUPTI holds no reference
        subscriber = ctypes.c_void_p()
        check(cupti.cuptiSubscribe(ctypes.byref(subscriber), self._callback, None), "cuptiSubscribe")
        wanted = [(_DRIVER_API, x) for x in (*_LAUNCH, *_LAUNCH_EX)] + [(_RESOURCE, _MODULE_LOADED)]
        for domain, number in wanted:
            check(cupti.cuptiEnableCallback(1, subscriber, domain, number), "cuptiEnableCallback")

    def cubin(self, name: str) -> bytes:
        """The newest cubin that holds a kernel; LookupError if there is none."""
        section = b".text." + name.encode() + b"\0"
        for cubin in reversed(self._cubins):
            if section in cubin:
                return cubin
        raise LookupError(f"none of the {len(self._cubins)} cubins that were loaded holds {name}")

    def _called(self, _data: Any, domain: int, number: int, pointer: int) -> None:
        if domain == _RESOURCE:
            resource = ctypes.cast(pointer, ctypes.POINTER(_Resource)).contents
            module = ctypes.cast(resource.descriptor, ctypes.POINTER(_Module)).contents
            self._cubins.append(ctypes.string_at(module.cubin, module.size))
            return
        call = ctypes.cast(pointer, ctypes.POINTER(_Api)).contents
        if call.site == _ENTER:
            launch = ctypes.cast(call.params, ctypes.POINTER(_LaunchEx if number in _LAUNCH_EX else _Launch)).contents
            sizes = list(launch.sizes.contents if number in _LAUNCH_EX else launch.sizes)
            params = list(self._params(launch.function, launch.params))
            name = call.symbol.decode()
            self.launches.append(Launch(name, tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6], params))

    def _params(self, function: int, pointers: Any) -> Iterator[bytes]:
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        number = 0
        while any(
            info(ctypes.c_void_p(function), ctypes.c_size_t(number), ctypes.byref(offset), ctypes.byref(size)) == 0
            for info in (self._cuda.cuFuncGetParamInfo, self._cuda.cuKernelGetParamInfo)  # of what has been launched
        ):
            yield ctypes.string_at(pointers[number], size.value)
            number += 1


def _library() -> ctypes.CDLL:
    """CUPTI: the one on the library path, or the one of an installed package."""
    roots = [pathlib.Path(x) / "nvidia" for x in sys.path if x] + [pathlib.Path("/usr/local/cuda")]
    for name in ("libcupti.so.13", "libcupti.so.12"):
        for candidate in [name, *(str(x) for root in roots for x in sorted(root.glob(f"**/{name}")))]:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(candidate)
    raise OSError(f"no CUPTI on the library path or under {', '.join(map(str, roots))}")


def check(status: int, what: str) -> None:
    """Raise RuntimeError where a function of CUDA did not return 0."""
    if status != 0:
        raise RuntimeError(f"{what} failed with status {status}")
