import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mustafar_jax import CompressionConfig, generation, prefill_attention
from mustafar_jax.models import Llama, ModelConfig, Qwen3, memory
from mustafar_jax.sharding import abstract_mesh

TINY = ModelConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=32, max_position_embeddings=4096,
)  # fmt: skip
RECOMMENDED = CompressionConfig.recommended(0.7, 0.7)
CONFIGS = pytest.mark.parametrize("compression", [generation.DENSE, RECOMMENDED], ids=["dense", "recommended"])


@CONFIGS
@pytest.mark.parametrize(
    ("model_class", "fields"),
    [(Llama, {}), (Llama, {"tie_word_embeddings": True}), (Qwen3, {"qk_norm": True, "attention_bias": True})],
)
def test_weights_and_caches_are_exact(compression, model_class, fields):
    config = dataclasses.replace(TINY, **fields)
    model = model_class(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    caches = model.init_cache(compression, batch=3, capacity=200)
    plan = memory.plan(config, compression, batch=3, capacity=200, dtype="bfloat16")
    assert plan.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert plan.caches == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert plan.fragments == plan.caches / config.num_layers
    assert plan.total == plan.weights + plan.caches + plan.working + plan.fragments


LLAMA_3_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_position_embeddings=131072,
)  # fmt: skip
THINK = CompressionConfig.recommended(0.5, 0.5, v_method="think")


@pytest.mark.parametrize(
    ("compression", "batch", "capacity", "dtype", "planned"),
    [
        (generation.DENSE, 1, 100, "bfloat16", (16_060_522_496, 13_107_360, 510_446_848, 409_605)),
        (generation.DENSE, 3, 2048, "bfloat16", (16_060_522_496, 805_306_848, 1_081_892_096, 25_165_839)),
        (RECOMMENDED, 3, 2048, "bfloat16", (16_060_522_496, 320_079_840, 1_081_892_096, 10_002_495)),
        (RECOMMENDED, 3, 70000, "float32", (32_121_044_992, 18_964_809_696, 19_426_598_144, 592_650_303)),
        (THINK, 3, 70000, "bfloat16", (16_060_522_496, 15_499_790_304, 3_083_558_144, 484_368_447)),
        (THINK, 40, 2048, "bfloat16", (16_060_522_496, 6_218_082_560, 2_956_961_024, 194_315_080)),
    ],
)
def test_plans_are_those_that_were_recorded(compression, batch, capacity, dtype, planned):
    """Measurements on GPUs were planned with these bytes: weights, caches, working, fragments."""
    plan = memory.plan(LLAMA_3_8B, compression, batch=batch, capacity=capacity, dtype=dtype)
    assert dataclasses.astuple(plan) == planned


@CONFIGS
@pytest.mark.parametrize("size", [0.6e9, 1e9, 4e9])
def test_the_largest_batch_fits_and_one_more_does_not(compression, size):
    options = {"capacity": 4096, "dtype": "bfloat16"}
    batch = memory.largest_batch(size, TINY, compression, **options)
    assert batch > 1
    assert memory.plan(TINY, compression, batch=batch, **options).total <= size
    assert memory.plan(TINY, compression, batch=batch + 1, **options).total > size


def test_nothing_fits_where_the_weights_do_not():
    assert memory.largest_batch(1e5, TINY, RECOMMENDED, capacity=64, dtype="bfloat16") == 0


def test_the_allowance_stops_growing_where_prompts_are_prefilled_some_at_a_time():
    def working(batch, length):
        config = dataclasses.replace(TINY, vocab_size=1)
        return memory.working_nbytes(config, RECOMMENDED, batch=batch, length=length, dtype="bfloat16")

    assert working(1, 4096) < working(16, 4096) < working(32, 4096) + 8 * 16
    assert working(32, 4096) - working(16, 4096) == 8 * 16  # the logits alone
    assert working(1, 2 * generation.PREFILL_TOKENS) > working(32, 4096)  # one prompt goes whole


@pytest.mark.parametrize(
    ("change", "compression", "dtype", "copies"),
    [
        ({}, RECOMMENDED, "bfloat16", 2),
        ({"head_dim": 32}, RECOMMENDED, "bfloat16", 4),
        ({}, RECOMMENDED, "float32", 4),
        ({}, dataclasses.replace(RECOMMENDED, v_method="think"), "bfloat16", 4),
        ({}, CompressionConfig(0.7, 0, v_method="think"), "bfloat16", 2),
    ],
)
def test_what_compression_holds_depends_on_who_packs(change, compression, dtype, copies, monkeypatch):
    """Keys and values that outweigh all else: each copy is as large as the whole."""
    monkeypatch.setattr(memory, "prefill_attention_nbytes", lambda *_, **__: 0)
    wide = dataclasses.replace(TINY, head_dim=64, num_heads=64, num_kv_heads=64, hidden_size=8, intermediate_size=8)
    config = dataclasses.replace(wide, **change)
    tokens = 1024
    kv = 2 * config.num_kv_heads * config.head_dim * tokens * jnp.dtype(dtype).itemsize
    held = memory.working_nbytes(config, compression, batch=1, length=tokens, dtype=dtype) - memory.RESERVE
    assert held == pytest.approx(copies * kv, rel=0.02)


def test_in_float32_the_scores_of_a_prompt_are_counted():
    """Prompts are then attended through XLA, which holds those of some queries: here more than all else."""
    config = dataclasses.replace(TINY, num_heads=8)
    batch, length = 2, 2048
    shapes = [jax.ShapeDtypeStruct((batch, length, heads, config.head_dim), jnp.float32) for heads in (8, 2, 2)]
    run = functools.partial(prefill_attention, implementation="xla")
    held = jax.jit(run).lower(*shapes, jnp.full(batch, length)).compile().memory_analysis().temp_size_in_bytes
    planned = memory.working_nbytes(config, generation.DENSE, batch=batch, length=length, dtype="float32")
    assert held < planned - memory.RESERVE < 1.5 * held


@pytest.mark.exhaustive
def test_a_device_of_a_mesh_has_its_part():
    """Norms are whole on each, and the dense tail on each of a context axis."""
    shape = LLAMA_3_8B
    options = {"batch": 8, "capacity": 16384, "dtype": "bfloat16"}
    config = CompressionConfig.preset("fast")
    one = memory.plan(shape, config, **options)
    for sizes, weights, caches in (({"tensor": 8}, 8, 8), ({"data": 2, "tensor": 2, "context": 2}, 2, 7.5)):
        part = memory.plan(shape, config, **options, mesh=abstract_mesh(sizes))
        assert one.weights / weights <= part.weights < one.weights / weights * 1.001
        assert one.caches / 8 <= part.caches <= one.caches / caches * 1.001
        assert part.working < one.working
