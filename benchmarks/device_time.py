"""What the kernels of a compiled function took, by the named scopes that they come from."""

import collections
import pathlib
import re
from collections.abc import Iterable

import jax

NO_GRAPHS: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
"""Compiler options under which each kernel is launched, and profiled, by itself."""

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


def split(trace: pathlib.Path, hlo: str, scopes: Iterable[str]) -> dict[str, float]:
    """Seconds of device time under each of the scopes, and under "rest".

    Args:
        trace: the folder that `jax.profiler.trace` wrote, of nothing but runs of one compiled function.
        hlo: that function's text, `compiled.as_text()`, which says what scope an instruction comes from. It must have
            been compiled with `NO_GRAPHS`: the profiler sees a CUDA graph as one piece.
        scopes: names given by `jax.named_scope`; where scopes are nested, the first of these names counts.
    """
    origin = {name: set(path.split("/")) for name, path in _INSTRUCTION.findall(hlo)}
    seconds = dict.fromkeys([*scopes, "rest"], 0.0)
    for instruction, duration in _kernels(trace).items():
        name = next((scope for scope in scopes if scope in origin.get(instruction, ())), "rest")
        seconds[name] += duration
    return seconds


def _kernels(trace: pathlib.Path) -> dict[str, float]:
    """Seconds of each instruction's kernels and copies, on all GPUs and streams together; "" for those of none."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for file in trace.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):  # other lines repeat these events in groups
                    for event in line.events:
                        seconds[str(dict(event.stats).get("hlo_op", ""))] += event.duration_ns * 1e-9
    return seconds
