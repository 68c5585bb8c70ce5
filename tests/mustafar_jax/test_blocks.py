"""A few tokens at once equal the same tokens one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax import CompressionConfig, LayerCache, append, decode_attention, prefill
from mustafar_jax.blocks import extend
from tests.helpers import CONFIGS, exhaustive, rope_frequencies, to_dense

BATCH, KV_HEADS, HEADS, HEAD_DIM, CAPACITY = 5, 2, 4, 32, 160
ALL = CONFIGS | {"output-aware": CompressionConfig(0.7, 0.5, k_method="output_aware", v_method="channel_output_aware")}
WINDOWS = {"dense": 50, "published": None, "recommended": 50, "no window": None, "output-aware": None}


def random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("name", "window"),
    [("recommended", 50), *exhaustive(*((name, window) for name, window in WINDOWS.items() if name != "recommended"))],
)
def test_equals_token_by_token(name, window):
    rng = np.random.default_rng(0)
    cache = LayerCache.init(
        ALL[name],
        batch=BATCH,
        capacity=CAPACITY,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=jnp.float32,
        inv_freq=rope_frequencies(HEAD_DIM),
    )
    prompt = [random(rng, BATCH, 100, heads, HEAD_DIM) for heads in (KV_HEADS, KV_HEADS, HEADS)]
    cache = jax.jit(prefill)(cache, *prompt[:2], jnp.array([100, 63, 0, 2, 36]), query=prompt[2])
    tokens = [random(rng, BATCH, 32, heads, HEAD_DIM) for heads in (KV_HEADS, KV_HEADS, HEADS)]
    blocks = jax.jit(extend, static_argnames="sliding_window")
    out, grown = blocks(cache, tokens[2], *tokens[:2], sliding_window=window)
    one_by_one, step = [], jax.jit(append)
    for i in range(32):
        key, value, query = (np.asarray(x)[:, i] for x in tokens)
        cache = step(cache, key, value, query=query)
        one_by_one.append(np.asarray(decode_attention(query, cache, sliding_window=window)))
    np.testing.assert_allclose(out, np.stack(one_by_one, axis=1), atol=1e-5)
    for actual, expected in zip(jax.tree.leaves(grown), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dense", "published"])
def test_what_has_no_room_is_not_written(name):
    cache = LayerCache.init(ALL[name], batch=1, capacity=12, num_kv_heads=1, head_dim=32, dtype="float32")
    first, second = (jnp.arange(start, start + 8.0)[None, :, None, None] * jnp.ones((1, 8, 1, 32)) for start in (1, 9))
    for tokens in (first, second):
        _, cache = jax.jit(extend)(cache, tokens, tokens, tokens)
    assert cache.lengths.tolist() == [12]
    assert cache.overflow.tolist() == [True]
    np.testing.assert_array_equal(to_dense(cache)[0][0, :, 0, 0], np.arange(1, 13))


def test_wrong_tokens_are_refused():
    cache = LayerCache.init(CONFIGS["published"], batch=1, capacity=99, num_kv_heads=1, head_dim=32, dtype="bfloat16")
    tokens = jnp.ones((1, 8, 1, 32), jnp.bfloat16)
    with pytest.raises(TypeError, match="key has dtype float32; the cache holds bfloat16"):
        extend(cache, tokens, tokens.astype(jnp.float32), tokens)
    with pytest.raises(ValueError, match=r"key has shape \(1, 4, 1, 32\); the cache wants \[B, n, K, H\]"):
        extend(cache, tokens, tokens[:, :4], tokens[:, :4])


def test_more_than_a_group_is_refused():
    cache = LayerCache.init(CONFIGS["published"], batch=1, capacity=99, num_kv_heads=1, head_dim=32, dtype="float32")
    tokens = jnp.ones((1, 33, 1, 32))
    with pytest.raises(ValueError, match="query has 33 tokens; at most group=32 are taken at a time"):
        extend(cache, tokens, tokens, tokens)
