"""Speed, on a model whose layers take a known time."""

import time

import jax
import pytest
from flax import nnx

import mustafar_jax as mj
from mustafar_jax.generation import DENSE
from mustafar_jax.generation.speed import measure
from mustafar_jax.models import Llama, ModelConfig


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    stops = tuple(range(64))  # whatever is written would end a generation, which is to be timed to its end
    config = ModelConfig(vocab_size=64, head_dim=32, max_position_embeddings=256, eos_ids=stops, **sizes)
    return Llama(config, rngs=nnx.Rngs(0))


def test_times_are_those_of_a_second_generation(model):
    start = time.perf_counter()
    speed = measure(model, mj.CompressionConfig(0.5, 0.5), batch=3, context=70, new_tokens=20)
    elapsed = time.perf_counter() - start
    second = speed.first_token + 3 * 19 / speed.tokens_per_second
    assert 0 < second < elapsed / 2  # compiling, which the first one does, takes most of the time
    caches = model.init_cache(mj.CompressionConfig(0.5, 0.5), batch=3, capacity=90)
    assert speed.cache_nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))


def test_one_token_has_no_speed(model):
    with pytest.raises(ValueError, match="new_tokens=1 must be at least 2"):
        measure(model, DENSE, batch=1, context=8, new_tokens=1)
