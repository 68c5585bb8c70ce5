"""How decoding and prefill scale over devices, and what moves between them.

python -m benchmarks.scaling --devices 1 2 4 8 --axis tensor            # strong: the same work on more devices
python -m benchmarks.scaling --devices 1 2 4 8 --axis data --weak       # weak: as many sequences for each device

Models have random weights of one small shape; on a CPU, devices are virtual, and times tell nothing.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.collectives import collectives
from mustafar_jax import models
from mustafar_jax.config import PRESETS, CompressionConfig
from mustafar_jax.generation.prefill import prefill_prompt
from mustafar_jax.generation.state import decode_step
from mustafar_jax.models import Llama, ModelConfig
from mustafar_jax.models.memory import device_nbytes
from mustafar_jax.sharding import MESH_AXES, CacheSharding, make_mesh

SMALL = ModelConfig(
    vocab_size=256, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=32,
    max_position_embeddings=1 << 17,
)  # fmt: skip
STEPS = 8
"""Steps that are timed, after one to warm up; the fastest counts."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What a case took on so many devices; seconds, and bytes of one device.

    Attributes:
        devices, batch, context: the case.
        prefill_s: of a second prefill, compiled.
        step_s: of the fastest step.
        cache_nbytes: of all layers.
        moved: how many collectives a step has, and what a device has of them afterwards, by kind.
    """

    devices: int
    batch: int
    context: int
    prefill_s: float
    step_s: float
    cache_nbytes: int
    moved: dict[str, tuple[int, int]]


def measure(axis: str, devices: int, batch: int, context: int, config: CompressionConfig) -> Scaled:
    """One case, on the first devices."""
    mesh = make_mesh({axis: devices}, jax.devices()[:devices])
    sharding = CacheSharding.of(mesh)
    model = models.spread(Llama(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), mesh)
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (batch, context), dtype=np.int32)
    lengths = jnp.full(batch, context, jnp.int32)

    def prefill() -> Any:
        empty = model.init_cache(config, batch=batch, capacity=context + 64, sharding=sharding)
        return jax.block_until_ready(prefill_prompt(model, jnp.asarray(tokens), lengths, empty))

    prefill()
    prefill_s, (_, caches) = _timed(prefill)
    one = jnp.asarray(tokens[:, 0])
    step = jax.jit(decode_step, donate_argnums=2).lower(model, one, caches).compile()
    moved: dict[str, tuple[int, int]] = {}
    for kind, nbytes in collectives(step.as_text() or ""):
        count, total = moved.get(kind, (0, 0))
        moved[kind] = count + 1, total + nbytes
    cache_nbytes = sum(device_nbytes(cache) for cache in caches)
    times = []
    for _ in range(STEPS + 1):
        seconds, (_, caches) = _timed(functools.partial(_waited, step, model, one, caches))
        times.append(seconds)
    return Scaled(devices, batch, context, prefill_s, min(times[1:]), cache_nbytes, moved)


def _waited(step: Callable[..., Any], *arguments: Any) -> Any:
    return jax.block_until_ready(step(*arguments))


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    """Print a line of JSON for each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--axis", choices=MESH_AXES, default="tensor")
    parser.add_argument("--weak", action="store_true", help="as many sequences for each device")
    parser.add_argument("--batch", type=int, default=8, help="sequences; with --weak, of one device (%(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(options.devices))
    for devices in options.devices:
        batch = options.batch * (devices if options.weak else 1)
        found = measure(options.axis, devices, batch, options.context, CompressionConfig.preset(options.preset))
        print(json.dumps(dataclasses.asdict(found)), flush=True)


if __name__ == "__main__":
    main()
