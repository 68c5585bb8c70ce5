"""What the kernels of a compiled function took, by the named scopes that they come from."""

import collections
import concurrent.futures
import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Key = TypeVar("Key", bound=Hashable)

NO_GRAPHS: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
"""Compiler options under which each kernel is launched, and profiled, by itself."""

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


def lowered(function: Any, *arguments: Any) -> jax.stages.Lowered | Exception:
    """A jitted function, lowered; or why it cannot be."""
    try:
        return function.lower(*arguments)
    except Exception as error:
        return error


def compile_all(jobs: Mapping[Key, jax.stages.Lowered | Exception]) -> dict[Key, jax.stages.Compiled | Exception]:
    """Compile with `NO_GRAPHS`, many functions at a time; what fails, or failed in `lowered`, comes as an exception."""

    def one(job: jax.stages.Lowered | Exception) -> jax.stages.Compiled | Exception:
        if isinstance(job, Exception):
            return job
        try:
            return job.compile(compiler_options=NO_GRAPHS)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(jobs, pool.map(one, jobs.values()), strict=True))


def run(compiled: jax.stages.Compiled | Exception, *arguments: Any) -> Any:
    """The function's results, when they are there; raises what `compile_all` caught."""
    if isinstance(compiled, Exception):
        raise compiled
    return jax.block_until_ready(compiled(*arguments))


def steady(durations: Sequence[float]) -> float:
    """The sum of durations, were each the median one."""
    return statistics.median(durations) * len(durations)


def profile(
    compiled: jax.stages.Compiled,
    *arguments: Any,
    scopes: Iterable[str],
    total: Callable[[Sequence[float]], float] = sum,
) -> tuple[Any, dict[str, float]]:
    """Run a function that was compiled with `NO_GRAPHS` once: its results, and the seconds that `split` tells."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            results = jax.block_until_ready(compiled(*arguments))
        return results, split(pathlib.Path(folder), compiled.as_text() or "", scopes, total)


def split(
    trace: pathlib.Path, hlo: str, scopes: Iterable[str], total: Callable[[Sequence[float]], float] = sum
) -> dict[str, float]:
    """Seconds of device time under each of the scopes, and under "rest"; all 0 where there is no GPU.

    Args:
        trace: the folder that `jax.profiler.trace` wrote, of nothing but runs of one compiled function.
        hlo: that function's text, `compiled.as_text()`, which says what scope an instruction comes from. It must have
            been compiled with `NO_GRAPHS`: the profiler sees a CUDA graph as one piece.
        scopes: names given by `jax.named_scope`; where scopes are nested, the first of these names counts.
        total: of the seconds of one instruction's runs of one kernel; `steady` takes no notice of outliers, where all
            runs do the same.
    """
    scopes = list(scopes)
    origin = {name: set(path.split("/")) for name, path in _INSTRUCTION.findall(hlo)}
    seconds = dict.fromkeys([*scopes, "rest"], 0.0)
    for (instruction, _), durations in _kernels(trace).items():
        name = next((scope for scope in scopes if scope in origin.get(instruction, ())), "rest")
        seconds[name] += total(durations)
    return seconds


def _kernels(trace: pathlib.Path) -> dict[tuple[str, str], list[float]]:
    """Seconds of each run, by instruction ("" for none) and kernel or copy, on all GPUs and streams together."""
    seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for file in trace.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):  # other lines repeat these events in groups
                    for event in line.events:
                        instruction = str(dict(event.stats).get("hlo_op", ""))
                        seconds[instruction, event.name].append(event.duration_ns * 1e-9)
    return seconds
