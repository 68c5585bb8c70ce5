"""Registers and spills of decode attention through Mosaic GPU, as the assembler tells: python -m benchmarks.spills.

Compiles the kernel that attends packed rows for bfloat16 and head_dim 128, and prints a row for each number of slots
and of query heads, with and without centred keys. Needs a Hopper GPU.
"""

import argparse
import contextlib
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import require_gpu
from benchmarks.synthetic import THETA
from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.mosaic import decode_attention as mosaic_decode_attention
from mustafar_jax.pallas_kernels.mosaic.launch import MosaicParams
from mustafar_jax.rows import RowFormat, Rows

HEAD_DIM, ROWS, KV_HEADS = 128, 4096, 8
DTYPE = jnp.bfloat16
SLOTS = (40, 64)
GROUPS = (1, 4, 8, 16)
PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill stores": r"(\d+) bytes spill stores",
    "spill loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--warps", type=int, default=4, help="per block")
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS, help="of keys and of values, each row's")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="query heads per KV head")
    options = parser.parse_args(arguments)
    require_gpu("spills", capability=9.0)
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # the assembler's log goes to the standard output
    jax.config.update("jax_enable_compilation_cache", False)
    print("slots", "query heads", "centred", *PATTERNS, "(spills and stack in bytes)", sep=" | ", flush=True)
    for slots, centred, group in itertools.product(options.slots, (False, True), options.groups):
        found = measure(slots, group, centred, options.warps)
        print(slots, group, "yes" if centred else "no", *found, sep=" | ", flush=True)


def measure(slots: int, group: int, centred: bool, warps: int) -> list[str]:
    """What the log says for each of `PATTERNS`, or why it says nothing."""
    try:
        with _standard_output() as written:
            job = jax.jit(functools.partial(attend, warps=warps, centred=centred))
            jax.block_until_ready(job(*operands(slots, group)))
        log = written()
    except Exception as error:
        return [f"{type(error).__name__}: {error}".splitlines()[0][:200]]
    matches = [re.search(pattern, log) for pattern in PATTERNS.values()]
    if not any(matches):
        return [f"no such log; the output was {log[:500]!r}"]
    return [match.group(1) if match else "?" for match in matches]


def operands(slots: int, group: int) -> tuple[jax.Array, Rows, jax.Array, jax.Array]:
    """Query, rows of keys as of values, how many are seen, a mean key; all of zeros."""
    return (
        jnp.zeros((1, KV_HEADS, group, HEAD_DIM), DTYPE),
        RowFormat(HEAD_DIM, np.dtype(DTYPE), slots).empty((1, KV_HEADS), ROWS),
        jnp.zeros(1, jnp.int32),
        jnp.zeros((1, KV_HEADS, HEAD_DIM), jnp.float32),
    )


INV_FREQ = (THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)


def attend(
    query: jax.Array, rows: Rows, last: jax.Array, mean_key: jax.Array, *, warps: int, centred: bool
) -> list[jax.Array]:
    """The kernel by itself."""
    mean = Mean(mean_key, INV_FREQ, 4) if centred else None
    params = MosaicParams(splits=16, warps=warps)
    return mosaic_decode_attention.attend_rows(
        query, rows, rows, jnp.zeros_like(last), last, scale=HEAD_DIM**-0.5, mean=mean, params=params
    )


@contextlib.contextmanager
def _standard_output() -> Iterator[Callable[[], str]]:
    """Keep what the whole process, not Python alone, writes to its standard output; call what it yields afterwards."""
    with tempfile.TemporaryFile() as file:
        saved, text = os.dup(1), ""
        os.dup2(file.fileno(), 1)
        try:
            yield lambda: text
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            text = file.read().decode(errors="replace")


if __name__ == "__main__":
    main()
