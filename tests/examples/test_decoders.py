"""The cache in models of other people: tokens and logits are those of plain attention over the whole text."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mustafar_jax as mj
from tests.helpers import exhaustive

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
LENGTHS, STEPS, CAPACITY = np.array([70, 52]), 6, 160
SIZES = {"vocab": 64, "hidden": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "window": 24}
EVERY_ENTRY = mj.CompressionConfig(0.01, 0, center_keys=True, sink_tokens=4, residual_length=8)  # packed, exact
CODES = mj.CompressionConfig(0, 0, k_bits=8, v_bits=8, center_keys=True, sink_tokens=4, residual_length=8)


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nnx_decoder():
    """What generates from texts that are padded on the right, and the logits of whole texts."""
    module = example("nnx_decoder")
    model = module.Decoder(module.Config(**SIZES), nnx.Rngs(0))
    whole = nnx.jit(lambda model, tokens: model(tokens, jnp.full(len(tokens), tokens.shape[1]))[0])
    return module, lambda *args, **steps: module.generate(model, *args, **steps), lambda tokens: whole(model, tokens)


@pytest.fixture(scope="module")
def linen_decoder():
    """The same of texts that are padded on the left."""
    module = example("linen_decoder")
    model = module.Decoder(module.Config(**SIZES))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 4), int), jnp.full(2, 4))
    whole = jax.jit(lambda tokens: model.apply(params, tokens, jnp.full(len(tokens), tokens.shape[1]))[0])

    def generate(tokens, lengths, caches, *, steps):
        return module.generate(model, params, padded_on_the_left(tokens, lengths), lengths, caches, steps=steps)

    return module, generate, whole


@pytest.mark.parametrize("name", ["nnx_decoder", "linen_decoder"])
def test_keys_are_rotated_as_the_cache_wants(name):
    module = example(name)
    inv_freq = module.Config(**SIZES).inv_freq
    key = jnp.asarray(np.random.default_rng(0).standard_normal((1, 99, 2, SIZES["head_dim"])), jnp.float32)
    rotated = module.rope(key, jnp.arange(99)[None], inv_freq)
    if name == "nnx_decoder":
        with pytest.raises(ValueError, match="interleaved"):
            mj.check_rope(key, rotated, inv_freq)
        rotated = module.half_split(rotated)
    mj.check_rope(key, rotated, inv_freq)


def padded_on_the_left(tokens, lengths):
    width = tokens.shape[1]
    return jnp.asarray(
        [np.r_[np.full(width - n, 63), row[:n]] for row, n in zip(np.asarray(tokens), lengths, strict=True)]
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("compression", "tolerance"),
    [(EVERY_ENTRY, 2e-5), *exhaustive((mj.CompressionConfig(0, 0), 2e-5), (CODES, 0.03))],
)
@pytest.mark.parametrize("name", ["nnx_decoder", *exhaustive("linen_decoder")])
def test_two_turns_are_those_of_plain_attention(name, compression, tolerance, request):
    module, generate, whole = request.getfixturevalue(name)
    caches = module.init_caches(module.Config(**SIZES), compression, batch=2, capacity=CAPACITY)
    held = caches[0].nbytes + caches[1].nbytes
    texts, rng = [[], []], np.random.default_rng(0)
    for lengths in (LENGTHS, LENGTHS[::-1] - 1):
        turn = rng.integers(0, SIZES["vocab"], (2, 70))
        written, logits, caches = generate(jnp.asarray(turn), jnp.asarray(lengths), caches, steps=STEPS)
        texts = [
            [*text, *row[:n], *new] for text, row, n, new in zip(texts, turn, lengths, written.tolist(), strict=True)
        ]
        ends = np.array([len(text) for text in texts])
        padded = np.array([np.pad(text, (0, CAPACITY - len(text))) for text in texts])  # causal: unseen
        expected = np.asarray(whole(jnp.asarray(padded)))
        expected = np.stack([row[end - STEPS - 1 : end - 1] for row, end in zip(expected, ends, strict=True)])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, atol=tolerance * scale)
        if compression != CODES:
            np.testing.assert_array_equal(written, expected.argmax(-1))
        for cache in caches:
            np.testing.assert_array_equal(cache.lengths, [ends] * 2)
            assert not cache.overflow.any()
    assert held == caches[0].nbytes + caches[1].nbytes
    assert compression.is_dense or int(cache.config.packed_tokens(ends).min()) > 32
