"""Data and references that several tests use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax import CompressionConfig
from mustafar_jax.backends.registry import BACKENDS
from mustafar_jax.rope import rotate

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
CONFIGS = {
    "dense": CompressionConfig(0, 0),
    "published": CompressionConfig(0.7, 0.5),
    "recommended": CompressionConfig.recommended(0.7, 0.7),
    "dense keys": CompressionConfig.recommended(0, 0.7),
    "dense values": CompressionConfig.recommended(0.5, 0, group=64, residual_length=40),
    "no window": CompressionConfig.recommended(0.5, 0.5, residual_length=0, sink_tokens=1),
    "8 bits": CompressionConfig(0, 0, k_bits=8, v_bits=8, center_keys=True, sink_tokens=4),
    "pruned in 8 bits": CompressionConfig.recommended(0.5, 0.7, k_bits=8, v_bits=8),
    "fast": CompressionConfig.preset("fast"),
    "balanced": CompressionConfig.preset("balanced", residual_length=40),
    "small": CompressionConfig.preset("small", residual_length=32),
    "3 bits": CompressionConfig(0, 0, k_bits=3, v_bits=3, rotate_keys=True),
    "pruned in 4 bits": CompressionConfig.recommended(0.625, 0.5, k_bits=4, v_bits=4),
}

# Each compiled as one program: outside jit, every operation would be compiled by itself for every shape.
magnitude_mask = jax.jit(mj.magnitude_mask, static_argnums=1)
pack = jax.jit(mj.pack, static_argnames=("slots", "bits"))
unpack = jax.jit(mj.unpack)
rotated = jax.jit(rotate)


def mean_at(mean, rows):
    """A `Mean` [B, K, n, H] as rows [n] lack it: slow pairs are rotated to the middle of their group of 32."""
    positions = [mean.offset + place for place in (rows, rows // 32 * 32 + 16)]
    of_rows, of_groups = (rotated(mean.key[:, :, None], at, mean.inv_freq) for at in positions)
    pair = np.arange(2 * mean.inv_freq.size) % mean.inv_freq.size
    return np.where(pair < mean.fast_pairs, of_rows, of_groups)


to_dense = jax.jit(lambda cache: cache.to_dense())


def exhaustive(*cases):
    """Parameters that only --exhaustive runs; a case of several parameters is a tuple."""
    tuples = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*case, marks=pytest.mark.exhaustive) for case in tuples]


def bits(x):
    """The bits of a floating-point array, as a numpy array of unsigned integers: NaN and -0.0 compare exactly."""
    x = np.asarray(x)
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def adversarial(rng, shape, dtype):
    """Random numbers with many ties, and NaN of both signs, infinities, -0.0 and subnormals among them."""
    unsigned = np.uint32 if jnp.dtype(dtype).itemsize == 4 else np.uint16
    ordinary = np.asarray(jnp.asarray(rng.standard_normal(shape).round(1), dtype)).view(unsigned)
    anything = rng.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
    finfo = jnp.finfo(dtype)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, finfo.smallest_subnormal, -finfo.tiny / 2])
    special = np.asarray(special.astype(dtype)).view(unsigned)
    choice = rng.integers(0, 4, shape)
    picked = np.where(choice == 0, anything, np.where(choice == 1, rng.choice(special, shape), ordinary))
    return jnp.asarray(picked.astype(unsigned).view(dtype))


def rms_error_ratio(actual, expected):
    """||actual - expected|| / ||expected|| in float64; NaN where actual holds one."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def rope_frequencies(head_dim, theta=10000.0):
    """Plain RoPE's frequencies, float32 [head_dim / 2]."""
    return (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="sliding_window")
def attention_on_dense(query, key, value, lengths, sliding_window=None):
    """What decode attention must equal: query [B, N, H] at position lengths - 1 on key, value [B, S, K, H]."""
    position, last = jnp.arange(key.shape[1]), lengths[:, None]
    visible = position < last
    if sliding_window is not None:
        visible &= last - 1 - position < sliding_window
    exact = (x.astype(jnp.float32) for x in (query[:, None], key, value))
    with jax.default_matmul_precision("highest"):
        out = jax.nn.dot_product_attention(*exact, mask=visible[:, None, None])[:, 0]
    return jnp.where(lengths[:, None, None] > 0, out, 0)


def replace_backend(monkeypatch, name, **fields):
    """Give the backend of a name other operations, for one test."""
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], **fields))
