"""Time PyTorch's attention backends on dense caches; `benchmarks.attention` runs this in a process of its own.

The arguments: a JSON list of shapes, {"name", "batch", "kv_heads", "group", "tokens", "head_dim"}; and how many bytes
the calls of a measurement must read in turn, so that none finds its cache in the GPU's second-level cache. The last
line printed is a JSON object, microseconds by shape and backend, from events around calls that queue one behind the
other.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import no_gpu

REPEATS, CALLS = 7, 20
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    shapes, swept = sys.argv[1:] if arguments is None else arguments
    if not torch.cuda.is_available():
        sys.exit(no_gpu("torch_attention"))
    times: dict[str, dict[str, float]] = {}
    for shape in json.loads(shapes):
        times[shape["name"]] = {}
        for name, backend in BACKENDS.items():
            try:
                times[shape["name"]][name] = measure(shape, backend, int(swept))
            except RuntimeError as error:  # a backend that does not take this shape
                print(f"{name}, {shape['name']}: {error}", file=sys.stderr)
    print(json.dumps({name: of_shape for name, of_shape in times.items() if of_shape}))


def measure(shape: dict[str, int], backend: SDPBackend, swept: int) -> float:
    """Median microseconds of a call."""
    size = (shape["batch"], shape["kv_heads"], shape["tokens"], shape["head_dim"])
    heads = (shape["batch"], shape["kv_heads"] * shape["group"], 1, shape["head_dim"])
    caches = max(1, math.ceil(swept / (4 * math.prod(size))))
    rows = [[torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)] for _ in range(caches)]
    query = torch.randn(heads, dtype=torch.bfloat16, device="cuda")
    calls = caches * math.ceil(CALLS / caches)
    times = []
    with sdpa_kernel(backend):
        for _ in range(REPEATS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for call in range(calls):
                key, value = rows[call % caches]
                scaled_dot_product_attention(query, key, value, enable_gqa=shape["group"] > 1)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
