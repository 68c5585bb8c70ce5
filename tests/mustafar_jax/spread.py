"""What caches and a small model give on 8 devices, beside one; a program of its own, which sets the number of devices.

python -m tests.mustafar_jax.spread '[{"sizes": {"data": 2, "tensor": 4}, "config": "coded"}, ...]'
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mustafar_jax as mj
from benchmarks.collectives import collectives
from mustafar_jax import models
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation.prefill import extend_prompt, prefill_prompt
from mustafar_jax.generation.state import decode_step
from mustafar_jax.models import Llama, ModelConfig
from mustafar_jax.sharding import CacheSharding, make_mesh

SHORT: dict[str, Any] = {"residual_length": 0, "sink_tokens": 3}
CONFIGS = {
    "pruned": CompressionConfig.recommended(0.5, 0.7, **SHORT),
    "coded": CompressionConfig.preset("fast", **SHORT),
    "unequal": CompressionConfig(0.5, 0.5, v_method="channel_magnitude", residual_length=0),
    "dense": CompressionConfig(0, 0),
}
BATCH, LENGTH, CAPACITY, TURN, STEPS = 8, 200, 1024, 40, 6
LENGTHS = np.array([200, 133, 200, 34, 180, 64, 97, 1], np.int32)
COUNTS = np.array([25, 28, 0, 33, 11, 7, 32, 31], np.int32)  # soon a group is full
SHAPE = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=32,
    max_position_embeddings=2048,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (BATCH, LENGTH + TURN + STEPS), dtype=np.int32)


def model_on(mesh: jax.sharding.Mesh | None) -> Llama:
    """The model, with weights that tell tokens apart."""
    model = Llama(SHAPE, rngs=nnx.Rngs(0))
    model = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, model)
    return model if mesh is None else models.spread(model, mesh)


def logits_of(model: Llama, config: CompressionConfig, sharding: CacheSharding | None) -> tuple[list[Any], str, Any]:
    """Logits after prompts, after a second turn, and after tokens one by one; a step's program; a layer's cache."""
    options: dict[str, Any] = {} if sharding is None else {"sharding": sharding}
    caches = model.init_cache(config, batch=BATCH, capacity=CAPACITY, **options)
    first, caches = prefill_prompt(model, jnp.asarray(TOKENS[:, :LENGTH]), jnp.asarray(LENGTHS), caches)
    turn = jnp.asarray(TOKENS[:, LENGTH : LENGTH + TURN])
    second, caches = extend_prompt(model, turn, jnp.asarray(COUNTS), caches)
    found = [first, jnp.where(COUNTS[:, None] > 0, second, 0)]
    step = jax.jit(decode_step, donate_argnums=2).lower(model, turn[:, 0], caches).compile()
    for number in range(STEPS):
        logits, caches = step(model, jnp.asarray(TOKENS[:, LENGTH + TURN + number]), caches)
        found.append(logits)
    return [np.asarray(x) for x in found], step.as_text() or "", caches[0]


def moved_by_packing(config: CompressionConfig, mesh: jax.sharding.Mesh) -> list[Any]:
    """The collectives of a compiled `prefill`, whose keys and values lie as the cache does; and a device's share."""
    sharding, sizes = CacheSharding.of(mesh), {"batch": BATCH, "num_kv_heads": 8, "head_dim": 32, "num_heads": 8}
    cache = mj.LayerCache.init(
        config, capacity=CAPACITY, dtype=jnp.float32, inv_freq=np.ones(16, np.float32), sharding=mesh, **sizes
    )
    place = jax.sharding.NamedSharding(mesh, sharding.spec("batch", None, "kv_heads", None))
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, 8, 32), jnp.float32, sharding=place)
    fill = jax.jit(lambda cache, key, query: mj.prefill(cache, key, key, query=query))
    return [tuple(each) for each in collectives(fill.lower(cache, x, x).compile().as_text() or "")]


def share(spread: Any, one: Any) -> float:
    """Bytes of packed rows on the device that has the most of them, over those of one device's whole cache."""

    def largest(cache: Any) -> int:
        leaves = jax.tree.leaves(cache if cache.config.is_dense else (cache.keys.packed, cache.values.packed))
        return sum(max(part.data.nbytes for part in leaf.addressable_shards) for leaf in leaves)

    return largest(spread) / largest(one)


def generated(model: Llama, config: CompressionConfig, mesh: jax.sharding.Mesh | None) -> list[Any]:
    """Tokens of two turns of a conversation."""
    options: dict[str, Any] = {"max_new_tokens": 20, "config": config, "mesh": mesh}
    first = mj.generate(model, TOKENS[:, :LENGTH], lengths=LENGTHS, capacity=CAPACITY, **options)
    assert first.caches is not None
    told = np.asarray(first.tokens).tolist()
    second = mj.generate(model, TOKENS[:, LENGTH : LENGTH + TURN], caches=first.caches, **options)
    assert second.caches is not None
    return [told, np.asarray(second.tokens).tolist(), np.asarray(second.caches[0].lengths).tolist()]


def compared(case: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """What is found of a mesh and a config."""
    config, mesh = CONFIGS[case["config"]], make_mesh(case["sizes"])
    sharding, model = CacheSharding.of(mesh), model_on(mesh)
    logits, program, cache = logits_of(model, config, sharding)
    if case["config"] not in one:
        one[case["config"]] = *logits_of(model_on(None), config, None), {}
    expected, _, whole, texts = one[case["config"]]
    found: dict[str, Any] = {
        "error": max(float(np.abs(a - b).max()) for a, b in zip(logits, expected, strict=True)),
        "largest": float(max(np.abs(x).max() for x in expected)),
        "step": [tuple(each) for each in collectives(program)],
        "packing": moved_by_packing(config, mesh),
        "share": share(cache, whole),
    }
    if case.get("generates"):
        texts.setdefault("one", generated(model_on(None), config, None))
        found["same text"] = generated(model, config, mesh) == texts["one"]
    return found


def main() -> None:
    """Print what is found of each case, as JSON."""
    jax.config.update("jax_num_cpu_devices", 8)
    one: dict[str, Any] = {}
    sys.stdout.write(json.dumps([compared(case, one) for case in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
