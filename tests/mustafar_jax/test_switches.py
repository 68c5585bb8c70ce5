"""jax's own switches: under each of them, everything public runs and gives what it gives without."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import mustafar_jax as mj
from mustafar_jax.config import CompressionConfig
from mustafar_jax.models import Mistral, ModelConfig
from tests.helpers import exhaustive, rope_frequencies
from tests.pallas_kernels.lowering import lower_for_cuda

Switch = Callable[[], AbstractContextManager[Any]]


def together(*switches: Switch) -> Switch:
    """Switches of which each has errors of its own, as one: what is compiled and run serves for all."""

    @contextlib.contextmanager
    def under_all() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for switch in switches:
                stack.enter_context(switch())
            yield

    return under_all


TRACING: dict[str, Switch] = {
    "promotion, checking leaks": together(
        functools.partial(jax.numpy_rank_promotion, "raise"),
        functools.partial(jax.numpy_dtype_promotion, "strict"),
        jax.checking_leaks,
    ),
    "explicit mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))),
}
"""What they look at shows in tracing, so that nothing is compiled."""

NANS = "debug_nans, debug_infs"
RUNNING: dict[str, Switch] = {
    "disable_jit": jax.disable_jit,
    NANS: together(functools.partial(jax.debug_nans, True), functools.partial(jax.debug_infs, True)),
    "x64": functools.partial(jax.enable_x64, True),
}

GENERATING = TRACING | RUNNING | {"transfer guard": functools.partial(jax.transfer_guard, "disallow")}
GENERATORS: dict[str, Switch] = {name: functools.partial(jax.default_prng_impl, name) for name in ("rbg", "unsafe_rbg")}
DRAWING = GENERATING | GENERATORS

SHORT: dict[str, Any] = {"residual_length": 0, "sink_tokens": 1}
CONFIGS = {
    "dense": CompressionConfig(0, 0),
    "published": CompressionConfig(0.5, 0.5, residual_length=0),
    "recommended": CompressionConfig.recommended(0.5, 0.7, **SHORT),
    "coded": CompressionConfig(0, 0.5, k_bits=3, v_bits=4, center_keys=True, rotate_keys=True, **SHORT),
    "by queries": CompressionConfig(0.5, 0.5, k_method="output_aware", v_method="channel_output_aware", **SHORT),
    "by channels": CompressionConfig(0.5, 0.5, k_method="think", v_method="channel_magnitude", **SHORT),
    "2:4": CompressionConfig(0.5, 0.5, k_method="2:4", v_method="2:4", **SHORT),
}

SHAPE = ModelConfig(
    vocab_size=11, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
    max_position_embeddings=64, sliding_window=36, attention_bias=True, mlp_bias=True,
)  # fmt: skip

LENGTHS = np.array([34, 20], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 34), dtype=np.int32)
QUERY, KEY, VALUE = (
    np.random.default_rng(1).standard_normal((2, 34, heads, 32), dtype=np.float32) for heads in (2, 1, 1)
)


def rows(_config: CompressionConfig | None) -> Any:
    """Packing, unpacking and the two products."""
    x = jnp.asarray(KEY[:, :, 0])
    packed = mj.pack(x, mj.magnitude_mask(x, 0.5), slots=16)
    query, weights = jnp.asarray(QUERY[:, 0]), jnp.asarray(KEY[:, :2, 0, :1] * KEY[:, :, 0, 0][:, None])
    products = mj.key_spmv(query, packed), mj.value_spmv(weights, packed)
    return packed, mj.unpack(packed), products, mj.unpack(mj.pack(x, bits=4))


def caches(config: CompressionConfig) -> Any:
    """A prompt into a cache, a few of its sequences anew, tokens after it, and attention on it."""
    query, key, value = (jnp.asarray(x) for x in (QUERY, KEY, VALUE))
    sizes: dict[str, Any] = {"batch": 2, "capacity": 70, "num_kv_heads": 1, "num_heads": 2, "head_dim": 32}
    cache = mj.LayerCache.init(config, **sizes, dtype=jnp.float32, inv_freq=rope_frequencies(32))
    cache = mj.prefill(cache, key, value, jnp.asarray(LENGTHS), query=query)
    cache = mj.prefill(cache, key[:1], value[:1], [33], query=query[:1], rows=[1])
    cache = mj.append(cache, key[:, 3], value[:, 3], query=query[:, 3])
    attended = [mj.decode_attention(query[:, 4], cache, sliding_window=window) for window in (None, 20)]
    return cache, cache.to_dense(), attended


def prompts(_config: CompressionConfig | None) -> Any:
    query, key, value = (jnp.asarray(x) for x in (QUERY, KEY, VALUE))
    return mj.prefill_attention(query, key, value, jnp.asarray(LENGTHS), sliding_window=20)[:, :20]


def generation(config: CompressionConfig | None) -> Any:
    """Greedy, with stop tokens that must not come at first; and scoring."""
    model = tiny()
    options: dict[str, Any] = {"lengths": LENGTHS, "max_new_tokens": 3, "config": config}
    result = mj.generate(model, TOKENS, eos_id=(3, 4), min_new_tokens=2, **options)
    steps = list(mj.stream(model, TOKENS, eos_id=(3, 4), min_new_tokens=2, **options))
    return result, steps, mj.log_likelihoods(model, TOKENS, prompt_length=32, config=config)


def drawing(config: CompressionConfig | None) -> Any:
    """Tokens that are drawn: not the same ones by every generator, but the same by `generate` and `stream`."""
    with jax.transfer_guard("allow"):
        key = jax.random.key(3)
    options: dict[str, Any] = {"max_new_tokens": 3, "config": config, "temperature": 0.7, "top_p": 0.9, "key": key}
    result = mj.generate(tiny(), TOKENS, **options)
    np.testing.assert_array_equal(np.stack(list(mj.stream(tiny(), TOKENS, **options)), axis=1), result.tokens)
    return result


def model(_config: CompressionConfig | None) -> Any:
    return tiny()(jnp.asarray(TOKENS))


@functools.cache
def tiny() -> Mistral:
    with jax.enable_x64(False):
        graph, state = nnx.split(Mistral(SHAPE, rngs=nnx.Rngs(0)))
        return nnx.merge(graph, jax.tree.map(lambda weight: weight * 8 if weight.ndim > 1 else weight, state))


@pytest.fixture(scope="module", autouse=True)
def _model_is_made_under_no_switch() -> None:
    tiny()


WITHOUT_CACHE = (rows, prompts, model)
PROGRAMS = {use: jax.jit(use, static_argnums=0) for use in (rows, caches, prompts, model)}
"""As one program each: outside jit, every operation would be compiled by itself."""


def computed(use: Any, name: str, switch: str | None = None) -> Any:
    """What a use gives; operation by operation where the switch looks at each."""
    return (use if switch in ("disable_jit", NANS) else PROGRAMS.get(use, use))(CONFIGS[name])


@functools.cache
def usual(use: Any, name: str) -> Any:
    return jax.tree.map(np.asarray, computed(use, name))


def check_usual(result: Any, wanted: Any) -> None:
    jax.tree.map(lambda *_: None, result, wanted)  # of one structure
    for found, expected in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(found).dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def traced(use: Any, name: str) -> list[tuple[Any, Any]]:
    """Shapes and dtypes of what is computed."""
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(lambda: use(CONFIGS[name])))]


usually_traced = functools.cache(traced)


@pytest.mark.parametrize("switch", TRACING)
@pytest.mark.parametrize(
    "name",
    [*(few := ("recommended",)), *exhaustive(*(name for name in CONFIGS if name not in few))],
)
def test_caches_are_traced_under_it(switch, name):
    wanted = usually_traced(caches, name)
    with TRACING[switch]():
        assert traced(caches, name) == wanted


@pytest.mark.parametrize("switch", TRACING)
@pytest.mark.parametrize("use", WITHOUT_CACHE)
def test_what_needs_no_cache_is_traced_under_it(switch, use):
    wanted = usually_traced(use, "dense")
    with TRACING[switch]():
        assert traced(use, "dense") == wanted


RUN = exhaustive(*[(switch, name) for switch in RUNNING for name in ("recommended", "coded")])
"""What generation does with a cache, for which operations are compiled one by one."""


@pytest.mark.parametrize(("switch", "name"), RUN)
def test_caches_hold_the_usual_under_it(switch, name):
    with RUNNING[switch]():
        result = computed(caches, name, switch)
    check_usual(result, usual(caches, name))


def test_tokens_that_are_not_there_are_no_infinities():
    """Their log-sum-exp would be, where it is asked for."""
    cache = mj.LayerCache.init(CONFIGS["dense"], batch=2, capacity=8, num_kv_heads=1, head_dim=32, dtype=jnp.float32)
    new = jnp.ones((2, 2, 1, 32))
    with RUNNING[NANS]():
        out, cache = mj.attend(cache, new, new, new, [1, 2])
    assert np.isfinite(out).all()
    assert cache.lengths.tolist() == [1, 2]


BY_OPERATIONS = [(switch, rows) for switch in ("disable_jit", NANS)]  # of which there are two hundred
COMPUTED = [pair for switch in RUNNING for use in WITHOUT_CACHE if (pair := (switch, use)) not in BY_OPERATIONS]
COMPUTED += exhaustive(*BY_OPERATIONS)


@pytest.mark.parametrize(("switch", "use"), COMPUTED)
def test_what_needs_no_cache_is_the_usual_under_it(switch, use):
    with RUNNING[switch]():
        result = computed(use, "dense", switch)
    check_usual(result, usual(use, "dense"))


GENERATED = [("promotion, checking leaks", "dense"), ("transfer guard", "dense")]
GENERATED += exhaustive(*[(switch, "dense") for switch in ("explicit mesh", "disable_jit", NANS, "x64")])
GENERATED += exhaustive(("disable_jit", "recommended"), ("x64", "recommended"), (NANS, "recommended"))


@pytest.mark.parametrize(("switch", "name"), GENERATED)
def test_tokens_and_likelihoods_are_the_usual_ones_under_it(switch, name):
    with GENERATING[switch]():
        result = generation(CONFIGS[name])
    check_usual(result, usual(generation, name))


DRAWN = ("transfer guard",)
"""Beside the switches under which more is generated."""


@pytest.mark.parametrize("switch", [*DRAWN, *exhaustive(*(switch for switch in DRAWING if switch not in DRAWN))])
def test_tokens_are_drawn_under_it(switch):
    with DRAWING[switch]():
        result = drawing(CONFIGS["dense"])
    if "rbg" not in switch:  # another generator draws others
        check_usual(result, usual(drawing, "dense"))


@pytest.mark.parametrize("switch", [name for name in TRACING if name != "explicit mesh"])  # a kernel wants a shard_map
@pytest.mark.parametrize("name", ["mosaic_gpu", *exhaustive("triton")])
def test_kernels_are_traced_under_it(switch, name):
    sizes: dict[str, Any] = {"batch": 2, "capacity": 200, "num_kv_heads": 2, "head_dim": 64, "dtype": jnp.bfloat16}
    config = CompressionConfig.recommended()
    cache = mj.LayerCache.init(config, **sizes, inv_freq=rope_frequencies(64))
    query, prompt = jnp.zeros((2, 4, 64), jnp.bfloat16), jnp.zeros((2, 100, 2, 64), jnp.bfloat16)

    def step(query, prompt, cache):
        out = mj.decode_attention(query, cache, implementation=name)
        if name == "mosaic_gpu":  # which does nothing else
            return out
        cache = mj.prefill(cache, prompt, prompt, query=prompt, implementation=name)
        cache = mj.append(cache, prompt[:, 0], prompt[:, 0], implementation=name)
        return out, cache, mj.key_spmv(query.reshape(2, 2, 2, 64), cache.keys.packed, implementation=name)

    with TRACING[switch]():
        assert name in lower_for_cuda(step, query, prompt, cache)
