"""Packed rows that the kernels' tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import mustafar_jax as mj
from mustafar_jax.pallas_kernels.rows import Packed

TOLERANCE = {jnp.dtype(jnp.bfloat16): 5e-3, jnp.dtype(jnp.float16): 1e-3}
"""Largest RMS error ratio against float32 on the pruned tensors."""


def mask_like(rng, x, sparsity, kind):
    """Masks of [B, K, S, H]: by magnitude, in few words of each row, or of very unequal rows."""
    if kind == "magnitude":
        return mj.magnitude_mask(x, sparsity)
    if kind == "skewed":  # the same few neighbouring channels everywhere: words that are full, and words that are empty
        return jnp.broadcast_to(jnp.arange(x.shape[-1]) < mj.keep_count(x.shape[-1], sparsity), x.shape)[..., ::-1]
    share = rng.choice([0, 0.02, 0.5, 1], (*x.shape[:-1], 1))
    return jnp.asarray(rng.random(x.shape) < share)


def rows_of(rng, shape, dtype, sparsity, kind="magnitude"):
    """(rows as a kernel takes them, the same dense [B, K, S, H]); S is rounded up to a multiple of 32."""
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    if sparsity == 0:
        return x, x
    packed = mj.pack(x, mask_like(rng, x, sparsity, kind))
    padding = packed.bitmap.shape[2] - shape[2]
    return Packed(packed.bitmap, packed.values), jnp.pad(mj.unpack(packed), [(0, 0), (0, 0), (0, padding), (0, 0)])


def poison(rows, outside):
    """Rows with NaN values and full or arbitrary bitmaps where bool `outside` [B, S] holds."""
    outside = np.asarray(outside)[:, None]
    if not isinstance(rows, Packed):
        return jnp.where(outside[..., None], jnp.nan, rows)
    blocks = outside.reshape(*outside.shape[:2], -1, 1, 32, 1)
    values = jnp.where(blocks, jnp.nan, rows.values)
    return Packed(jnp.where(outside[..., None], jnp.uint32(0xFFFF0FFF), rows.bitmap), values)


def implementations(pytest):
    """Parameters for `interpret`: plain JAX anywhere, and the compiled kernel where there is a GPU."""
    return [
        pytest.param(True, id="interpret", marks=pytest.mark.slow),
        pytest.param(False, marks=pytest.mark.gpu, id="device"),
    ]


def float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def attend(query, key, value, first, last, scale):
    """Reference: float32 (out, m, l) of queries [B, K, G, H] on dense rows."""
    query, key, value = float32(query, key, value)
    row = jnp.arange(key.shape[2])
    seen = ((row >= first[:, None]) & (row < last[:, None]))[:, None, None]
    scores = jnp.einsum("bkgh,bksh->bkgs", query, key, precision=jax.lax.Precision.HIGHEST) * scale
    m = jnp.where(seen, scores, jnp.finfo(jnp.float32).min).max(axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - m[..., None]), 0)
    value = jnp.where(seen[:, :, 0, :, None], value, 0)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, value, precision=jax.lax.Precision.HIGHEST)
    return out, m, weights.sum(axis=-1)


def merge_splits(out, m, l):  # noqa: E741
    """Unnormalised splits, out [heads, splits, G, H], m and l [heads, splits, G], merged into one."""
    largest = m.max(axis=1)
    weight = jnp.exp(m - largest[:, None])
    return (out * weight[..., None]).sum(axis=1), largest, (l * weight).sum(axis=1)
