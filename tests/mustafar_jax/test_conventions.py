"""Which convention of RoPE keys follow is found out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax import CompressionConfig, LayerCache, check_rope, prefill
from tests.helpers import exhaustive, rms_error_ratio, rope_frequencies, rotated, to_dense

TOKENS = 200


def keys(head_dim, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((2, TOKENS, 2, head_dim)) + rng.standard_normal(head_dim), jnp.float32)


def half_split(x):
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def interleaved(x):
    return np.stack(np.split(np.asarray(x), 2, axis=-1), axis=-1).reshape(x.shape)


def half(x, inv_freq, positions=None):
    return np.asarray(rotated(x, np.arange(TOKENS)[:, None] if positions is None else positions[..., None], inv_freq))


def pairwise(x, inv_freq):
    return interleaved(half(half_split(x), inv_freq))


def partial(rotate, x, theta):
    turning = x.shape[-1] // 2
    return np.concatenate([rotate(x[..., :turning], rope_frequencies(turning, theta)), x[..., turning:]], axis=-1)


@pytest.mark.parametrize(
    ("head_dim", "theta", "dtype"),
    [(64, 1e4, jnp.float32), (128, 5e5, jnp.bfloat16), *exhaustive((128, 5e5, jnp.float32), (64, 1e4, jnp.bfloat16))],
)
def test_conventions_are_named(head_dim, theta, dtype):
    x, inv_freq = keys(head_dim).astype(dtype), rope_frequencies(head_dim, theta)
    check_rope(x, jnp.asarray(half(x, inv_freq), dtype), inv_freq)
    check_rope(x, jnp.asarray(1.2 * half(x, inv_freq), dtype), inv_freq)  # YaRN's
    check_rope(x, half_split(jnp.asarray(pairwise(x, inv_freq), dtype)), inv_freq)
    cases = {
        rf"the interleaved convention, {head_dim} of {head_dim} channels turn; .*: permute": pairwise(x, inv_freq),
        rf"the partial convention, {head_dim // 2} of {head_dim} .* zeros": partial(half, x, theta),
        rf"the partial and interleaved convention, {head_dim // 2} of .* let even": partial(pairwise, x, theta),
        "other angles than inv_freq tells, most of all pair": half(x, -inv_freq),
        "follows no convention": half(x, inv_freq)[..., ::-1],
        "rotated follows no": x,
    }
    for message, turned in cases.items():
        with pytest.raises(ValueError, match=message):
            check_rope(x, jnp.asarray(turned, dtype), inv_freq)


def test_what_a_partial_convention_asks_for_is_right():
    x, inv_freq, quarter = keys(64), rope_frequencies(32), 16
    order = np.r_[:quarter, 2 * quarter : 3 * quarter, quarter : 2 * quarter, 3 * quarter : 64]
    check_rope(x[..., order], partial(half, x, 1e4)[..., order], np.r_[inv_freq, np.zeros(quarter)])


@pytest.mark.exhaustive
def test_keys_of_another_convention_are_held_less_exactly():
    rng, inv_freq, theta = np.random.default_rng(1), rope_frequencies(64), 1e4
    x = jnp.asarray(rng.standard_normal((2, TOKENS, 2, 64)) + 2 * rng.standard_normal(64), jnp.float32)
    config = CompressionConfig.recommended(0.7, 0.7)
    sizes = {"batch": 2, "capacity": TOKENS, "num_kv_heads": 2, "head_dim": 64, "dtype": jnp.float32}
    cache, errors = LayerCache.init(config, **sizes, inv_freq=inv_freq), []
    for turned in (half(x, inv_freq), pairwise(x, inv_freq), partial(half, x, theta)):
        filled = jax.jit(prefill)(cache, turned, turned, query=turned)
        errors.append(rms_error_ratio(to_dense(filled)[0], turned))
    np.testing.assert_allclose(errors, [0.19, 0.32, 0.29], atol=0.01)


def test_positions_are_those_that_are_given():
    x, inv_freq, positions = keys(64), rope_frequencies(64), np.arange(TOKENS) + np.array([[0], [50]])
    turned = half(x, inv_freq, positions)
    check_rope(x, turned, inv_freq, positions)
    with pytest.raises(ValueError, match="other angles"):
        check_rope(x, turned, inv_freq)
    with pytest.raises(ValueError, match="other angles"):  # of one pair alone
        check_rope(x, turned, np.r_[inv_freq[:5], 1.1 * inv_freq[5], inv_freq[6:]], positions)


def test_bad_arguments():
    x, inv_freq = keys(64), rope_frequencies(64)
    for message, arguments in {
        r"key has shape \(2, 200, 64\), rotated \(2, 200, 2, 64\); wanted": (x[:, :, 0], x, inv_freq),
        r"inv_freq has shape \(16,\); wanted \[32\]": (x, x, inv_freq[:16]),
        r"positions has shape \(3,\); wanted \[200\] or \[2, 200\]": (x, x, inv_freq, np.arange(3)),
        "positions are all 0": (x, x, inv_freq, np.zeros(TOKENS, int)),
    }.items():
        with pytest.raises(ValueError, match=message):
            check_rope(*arguments)
    with pytest.raises(TypeError, match="no traced arrays"):
        jax.jit(check_rope)(x, x, inv_freq)
