"""Launch the kernels, as jax compiles them, in a process without jax: for compute-sanitizer.

    python -m benchmarks.memcheck --prepare DIR
    compute-sanitizer --tool memcheck --padding 1024 python -m benchmarks.memcheck --launch DIR
    compute-sanitizer --tool racecheck python -m benchmarks.memcheck --launch DIR --only mosaic

The first command runs each kernel on small inputs and writes its machine code, how it was launched, its inputs and its
results. The second imports no jax: it launches the same code on buffers of exactly the operands' sizes, each allocated
by itself, and compares the results bit for bit. Its status is 1 if one of them differs.
"""

import argparse
import ctypes
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu import no_gpu, require_gpu

_MAX_DYNAMIC_SHARED = 8  # of CUfunction_attribute, as are the next
_COUNTS = {"bytes of static shared memory": 1, "registers": 4, "bytes of local memory": 3}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare or launch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", type=pathlib.Path, metavar="DIR", help="write launches to this folder; needs a GPU")
    what.add_argument("--launch", type=pathlib.Path, metavar="DIR", help="launch what is there")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name")
    options = parser.parse_args(arguments)
    if options.prepare is not None:
        require_gpu("memcheck")
        from benchmarks import memcheck_cases  # imports jax

        sys.exit(memcheck_cases.prepare(options.prepare, options.only))
    try:
        driver = Driver()
    except (OSError, RuntimeError) as error:  # there is no driver, or it finds no GPU
        sys.exit(no_gpu("memcheck", f"its driver says: {error}"))
    sys.exit(launch_all(driver, options.launch, options.only))


def launch_all(driver: "Driver", folder: pathlib.Path, only: str) -> int:
    """Launch all that was written, and say of each how it went; 1 if one failed, or there are none."""
    paths = [x for x in sorted(folder.glob("*.json")) if only in x.stem]
    failed = []
    for path in paths:
        try:
            said, good = launch(driver, path)
        except Exception as error:  # an invalid access ends the context, and all later launches with it
            said, good = f"{type(error).__name__}: {error}", False
        print(f"{path.stem}: {said}", flush=True)
        failed += [] if good else [path.stem]
    print(f"{len(paths)} launched, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return int(bool(failed) or not paths)


def launch(driver: "Driver", path: pathlib.Path) -> tuple[str, bool]:
    """Launch one kernel: what to say of it, and whether its results are those that were written."""
    facts = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as file:
        arrays = dict(file)
    function = driver.function(arrays["cubin"].tobytes(), facts["name"], facts["shared"])
    buffers = [driver.buffer(arrays[f"before{i}"]) for i in range(facts["buffers"])]
    params = [np.frombuffer(bytes.fromhex(x), np.uint8).copy() for x in facts["params"]]
    for param, offset, buffer in facts["pointers"]:
        params[param][offset : offset + 8] = np.frombuffer(buffers[buffer].to_bytes(8, "little"), np.uint8)
    driver.launch(function, facts["grid"], facts["block"], facts["shared"], params)
    wrong = {}
    for number, buffer in enumerate(buffers):
        expected = arrays[f"after{number}"]
        if differing := int((driver.read(buffer, expected.size) != expected).sum()):
            wrong[number] = f"{differing} of {expected.size}"
        driver.free(buffer)
    counts = {name: driver.attribute(function, number) for name, number in _COUNTS.items()}
    said = f"grid {facts['grid']}, block {facts['block']}, {facts['shared']} bytes of dynamic shared memory"
    said += "".join(f", {count} {name}" for name, count in counts.items())
    return f"{said}; " + (f"WRONG bytes by buffer: {wrong}" if wrong else "the same results"), not wrong


class Driver:
    """What is needed of the CUDA driver; RuntimeError where it fails."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def function(self, cubin: bytes, name: str, shared: int) -> ctypes.c_void_p:
        """A kernel, and leave to have so much dynamic shared memory."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        if shared:
            self._call("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), ctypes.c_int(shared))
        return function

    def attribute(self, function: ctypes.c_void_p, number: int) -> int:
        """Of a kernel."""
        value = ctypes.c_int()
        self._call("cuFuncGetAttribute", ctypes.byref(value), ctypes.c_int(number), function)
        return value.value

    def buffer(self, content: np.ndarray) -> int:
        """The address of new memory that holds some bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(content.size))
        self._call("cuMemcpyHtoD_v2", address, content.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(content.size))
        return address.value

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes at an address."""
        found = np.empty(nbytes, np.uint8)
        target = found.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return found

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        params: Sequence[np.ndarray],
    ) -> None:
        """Run a kernel to its end."""
        places = (ctypes.c_void_p * len(params))(*(x.ctypes.data for x in params))
        sizes = [ctypes.c_uint(x) for x in (*grid, *block, shared)]
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(), places, ctypes.c_void_p())
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., int] = getattr(self._cuda, name)
        if status := function(*arguments):
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'').decode()} ({status})")


if __name__ == "__main__":
    main()
