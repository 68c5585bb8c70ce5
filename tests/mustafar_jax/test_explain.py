"""Which backend is taken, and what is said of the others."""

import logging

import jax
import jax.numpy as jnp
import pytest

import mustafar_jax as mj
from mustafar_jax.backend import Operation
from mustafar_jax.backends import registry
from tests.helpers import replace_backend, rope_frequencies


def cache_of(config, dtype=jnp.bfloat16, **sizes):
    sizes = {"batch": 2, "capacity": 128, "num_kv_heads": 2, "head_dim": 64} | sizes
    return mj.LayerCache.init(config, dtype=dtype, inv_freq=rope_frequencies(sizes["head_dim"]), **sizes)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As where jax has a Hopper GPU; kernels are looked at, never run."""
    monkeypatch.setattr(registry, "on_cuda", lambda: True)
    monkeypatch.setattr("mustafar_jax.pallas_kernels.cuda.compute_capability", lambda: 9.0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a CPU")
def test_says_what_a_cpu_takes():
    found = mj.explain(cache_of(mj.CompressionConfig()), num_heads=6)
    assert {step: found.taken(step) for step in found.steps} == {"prefill": "xla", "pack": "xla", "decode": "xla"}
    assert list(found.steps["decode"]) == ["mosaic_gpu", "triton", "xla"]
    text = str(found)
    assert "decode  xla" in text
    assert "not triton: it needs an NVIDIA GPU; the default device is" in text


def test_says_what_a_gpu_takes(on_a_gpu):
    found = mj.explain(cache_of(mj.CompressionConfig()))
    assert found.steps["pack"]["triton"] is None
    assert found.steps["decode"]["mosaic_gpu"] is None
    for preset in ("fast", "balanced"):
        assert mj.explain(cache_of(mj.CompressionConfig.preset(preset))).steps["decode"]["triton"] is None
    for name in ("fast", "balanced", "small"):
        assert mj.explain(cache_of(mj.CompressionConfig.preset(name))).steps["pack"]["triton"] is None
    assert mj.explain(cache_of(mj.CompressionConfig(0, 0))).steps["decode"]["cudnn"] is None


@pytest.mark.parametrize(
    ("step", "name", "reason", "config", "options"),
    [
        ("decode", "mosaic_gpu", "float32", mj.CompressionConfig(), {"dtype": jnp.float32}),
        ("decode", "triton", "head_dim=96", mj.CompressionConfig(), {"head_dim": 96}),
        ("decode", "triton", "codes of 8 bits", mj.CompressionConfig(v_bits=8), {}),
        ("decode", "triton", "signs and magnitudes of 4 bits", mj.CompressionConfig.preset("small"), {}),
        (
            "decode",
            "triton",
            "both keys and values in codes, or neither; got keys of plain numbers and values of codes of 2 bits",
            mj.CompressionConfig(0.7, 0, v_bits=2),
            {},
        ),
        ("decode", "mosaic_gpu", "codes of 8 bits", mj.CompressionConfig(k_bits=8), {}),
        ("decode", "mosaic_gpu", "codes of 3 bits", mj.CompressionConfig(0, 0, k_bits=3), {}),
        (
            "prefill",
            "cudnn",
            "a multiple of 8 and at most 256; got head_dim=20",
            mj.CompressionConfig(0, 0),
            {"head_dim": 20},
        ),
        (
            "decode",
            "cudnn",
            "a multiple of 8 and at most 256; got head_dim=512",
            mj.CompressionConfig(0, 0),
            {"head_dim": 512},
        ),
        ("pack", "triton", "by magnitude; got 'think'", mj.CompressionConfig(v_method="think"), {}),
        ("pack", "triton", "do not rescale", mj.CompressionConfig(v_bits=8, rescale_values=True), {}),
        ("prefill", "cudnn", "cuDNN wants bfloat16 or float16", mj.CompressionConfig(), {"dtype": jnp.float32}),
        ("decode", "cudnn", "cuDNN wants bfloat16 or float16", mj.CompressionConfig(0, 0), {"dtype": jnp.float32}),
    ],
)
def test_says_why_a_better_one_cannot(step, name, reason, config, options, on_a_gpu):
    found = mj.explain(cache_of(config, **options))
    assert reason in found.steps[step][name]
    assert found.taken(step) != name
    with pytest.raises(NotImplementedError, match=reason):
        run(step, cache_of(config, **options), name)


def run(step, cache, name):
    """The step on shapes alone."""
    token = jnp.zeros((cache.batch, cache.num_kv_heads, cache.head_dim), cache.dtype)
    prompt = jnp.zeros((cache.batch, 96, cache.num_kv_heads, cache.head_dim), cache.dtype)
    if step == "decode":
        return jax.eval_shape(lambda: mj.decode_attention(token, cache, implementation=name))
    if step == "pack":
        return jax.eval_shape(lambda: mj.prefill(cache, prompt, prompt, implementation=name))
    lengths = jnp.full(cache.batch, 96)
    return jax.eval_shape(lambda: mj.prefill_attention(prompt, prompt, prompt, lengths, implementation=name))


def test_a_cache_is_explained_by_its_shapes():
    shapes = jax.eval_shape(lambda: cache_of(mj.CompressionConfig.recommended()))
    assert mj.explain(shapes) == mj.explain(cache_of(mj.CompressionConfig.recommended()))


def test_where_none_can_every_reason_is_told(monkeypatch):
    query = jnp.zeros((2, 2, 64))
    cache = cache_of(mj.CompressionConfig(), jnp.float32)
    replace_backend(monkeypatch, "triton", needs_cuda=False)
    with pytest.raises(NotImplementedError) as error:
        mj.decode_attention(query, cache, implementation=("cudnn", "mosaic_gpu", "triton"))
    message = str(error.value)
    if jax.default_backend() == "cpu":
        assert "cudnn: it needs an NVIDIA GPU" in message
        assert "mosaic_gpu: it needs an NVIDIA GPU" in message
    assert "triton: the Triton kernels take bfloat16 and float16; got dtype=float32" in message


def test_what_is_chosen_is_logged_once_a_shape(caplog, monkeypatch):
    registry._tell.cache_clear()
    monkeypatch.setattr(registry, "on_cuda", lambda: False)
    with caplog.at_level(logging.INFO, "mustafar_jax"):
        for _ in range(3):
            for length in (5, 6):
                x = jnp.zeros((1, length, 2, 32))
                with jax.disable_jit():
                    mj.prefill_attention(x, x, x, jnp.array([length]))
    messages = [record.getMessage() for record in caplog.records if record.name == "mustafar_jax"]
    assert len(messages) == 2
    assert messages[0].startswith("attend_prompt by xla: query float32[1, 5, 2, 32]")
    assert "passed over cudnn: it needs an NVIDIA GPU" in messages[0]


def test_cudnn_decodes_without_a_window(on_a_gpu):
    reasons = mj.explain(cache_of(mj.CompressionConfig(0, 0)), sliding_window=9).steps["decode"]
    assert reasons["cudnn"] == "cuDNN decoding has no sliding window; got sliding_window=9"


def test_a_sequence_of_one_is_refused_by_name():
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="attend packed caches here: triton: it needs an NVIDIA GPU"):
            run("decode", cache_of(mj.CompressionConfig()), ["triton"])


@pytest.mark.parametrize("implementation", [5, b"xla", [["xla"]], [None], {"xla"}])
def test_what_holds_no_names_is_refused(implementation):
    with pytest.raises(TypeError, match=r"implementation=.* must be a name, a sequence of names, or None"):
        run("decode", cache_of(mj.CompressionConfig()), implementation)


def test_a_backend_of_ones_own(monkeypatch):
    """One record in the registry is all that it takes."""
    record = registry.BACKENDS["xla"]
    own = type(record)("own", attend_packed=Operation(lambda operands: 7 + 0 * operands.query))
    monkeypatch.setitem(registry.BACKENDS, "own", own)
    cache = cache_of(mj.CompressionConfig())
    out = mj.decode_attention(jnp.ones((2, 2, 64), jnp.bfloat16), cache, implementation="own")
    assert (out == 7).all()


@pytest.mark.parametrize("num_heads", [3, 0, -2, 4.0, "4"])
def test_query_heads_that_do_not_go_with_the_cache_are_refused(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads!r} must be a multiple of the cache's 2 KV heads"):
        mj.explain(cache_of(mj.CompressionConfig()), num_heads=num_heads)
