"""Packed rows that the kernels' tests share, and how they compile what is interpreted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from mustafar_jax import layout
from mustafar_jax.codecs import codec_of
from mustafar_jax.operands import restored
from mustafar_jax.rotation import turn
from mustafar_jax.rows import RowFormat, Rows
from tests.helpers import magnitude_mask, mean_at, pack, unpack
from tests.quick import QUICK

TOLERANCE = {jnp.dtype(jnp.bfloat16): 5e-3, jnp.dtype(jnp.float16): 1e-3}
"""Largest RMS error ratio against float32 on the pruned tensors."""


def jit(function, *, interpret, **options):
    """jax.jit of what calls a kernel. An interpreted one runs for milliseconds; XLA would optimise it for seconds."""
    return jax.jit(function, compiler_options=QUICK if interpret else None, **options)


def masks(rng, x, slots, kinds):
    """Masks of [B, K, S, H], for each sequence of a kind: by magnitude, in few words of each row, or of unequal rows.

    No row holds more than `slots` entries; those by magnitude and those in few words hold as many.
    """
    by_kind = {
        "magnitude": lambda x: magnitude_mask(x, 1 - slots / x.shape[-1]),
        # the same neighbouring channels everywhere: words that are full, and words that are empty
        "skewed": lambda x: np.broadcast_to(np.arange(x.shape[-1]) >= x.shape[-1] - slots, x.shape),
        "unequal": lambda x: rng.permuted(np.broadcast_to(np.arange(x.shape[-1]), x.shape), axis=-1) < counts(x),
    }

    def counts(x):
        return rng.choice([0, 1, slots // 2, slots], (*x.shape[:-1], 1))

    x = np.asarray(x)
    return np.stack([np.asarray(by_kind[kind](x[b])) for b, kind in enumerate(kinds)])


def rows_of(rng, shape, dtype, sparsity, kinds="magnitude"):
    """(rows as a kernel takes them, the same dense [B, K, S, H]); S is rounded up to a multiple of 32.

    `kinds`: of each sequence's mask, or one for all.
    """
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    if sparsity == 0:
        return mj.pack(x), x
    kinds = [kinds] * shape[0] if isinstance(kinds, str) else kinds
    return pack_rows(x, masks(rng, x, mj.keep_count(shape[-1], sparsity), kinds))


def rows_of_words(bitmap, payload):
    """Plain rows with a bitmap of these arrays [B, K, ...], or their shapes."""
    slots = payload.shape[-3] * payload.shape[-1]
    how = RowFormat(bitmap.shape[3] * 32, np.dtype(payload.dtype), slots)
    return Rows(bitmap, payload, None, jnp.zeros(bitmap.shape[:2], bool), how, bitmap.shape[2])


def coded_format(head_dim, dtype, bits, pairs):
    """Of codes of so many bits of every entry."""
    return RowFormat(head_dim, np.dtype(dtype), None, codec_of("bits", bits, pruned=False), pairs)


def coded_rows(rng, shape, dtype, bits, pairs, *, turned=False):
    """(codes of random rows, the array [B, K, S, H] that they stand for), S a multiple of 32; turned first, or not."""

    @jax.jit
    def code(x):
        rows = coded_format(shape[-1], dtype, bits, pairs).pack(turn(x) if turned else x)
        return rows, restored(rows, turned=turned)

    rows, dense = code(jnp.asarray(rng.standard_normal(shape), dtype))
    return rows, np.pad(dense, [(0, 0), (0, 0), (0, rows.padded_length - shape[2]), (0, 0)])


def pruned_codes(rng, shape, dtype, sparsity, kinds):
    """As `coded_rows`, of what masks keep: 4 bits behind a bitmap. Some rows fill their last word, most do not."""
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    slots = mj.keep_count(shape[-1], sparsity)
    counts = {kind: slots if kind == "magnitude" else -(-slots // 8) * 8 for kind in kinds}
    mask = [masks(rng, x[b : b + 1], counts[kind], [kind]) for b, kind in enumerate(kinds)]
    rows = pack(x, np.concatenate(mask), slots=slots, bits=4)
    return rows, np.pad(unpack(rows), [(0, 0), (0, 0), (0, rows.padded_length - shape[2]), (0, 0)])


def pack_rows(x, mask):
    """As `rows_of`, for [B, K, S, H] and a mask."""
    packed = pack(x, mask, slots=max(1, int(np.asarray(mask).sum(axis=-1).max())))
    return packed, np.pad(unpack(packed), [(0, 0), (0, 0), (0, packed.padded_length - x.shape[2]), (0, 0)])


def with_mean(dense, mean):
    """Keys [B, K, S, H] as attention sees them, float32, of what packed ones hold and a `Mean`."""
    return dense.astype(np.float32) + mean_at(mean, np.arange(dense.shape[2]))


@jax.jit
def poison(rows, outside):
    """Rows with NaN values, or NaN scales, and full or arbitrary bitmaps where bool `outside` [B, S] holds."""
    outside = outside[:, None]
    if rows.scale is not None:
        rows = dataclasses.replace(rows, scale=jnp.where(layout.to_lanes(outside), jnp.nan, rows.scale))
        if rows.bitmap is None:
            return rows
        return dataclasses.replace(rows, bitmap=jnp.where(outside[..., None], jnp.uint32(0xFFFF0FFF), rows.bitmap))
    if rows.bitmap is None:
        return dataclasses.replace(rows, payload=jnp.where(outside[..., None], jnp.nan, rows.payload))
    blocks = outside.reshape(*outside.shape[:2], -1, 1, 32, 1)
    return dataclasses.replace(
        rows,
        bitmap=jnp.where(outside[..., None], jnp.uint32(0xFFFF0FFF), rows.bitmap),
        payload=jnp.where(blocks, jnp.nan, rows.payload),
    )


WHERE = [pytest.param(True, id="interpret"), pytest.param(False, marks=pytest.mark.gpu, id="device")]
"""Parameters for `interpret`: plain JAX or numpy anywhere, and the compiled kernel where there is a GPU."""


def everywhere(cases, few):
    """Parameters (*case, interpret): every case on a device, the few interpreted, and the others so with --exhaustive.

    A case is a tuple, or one parameter. Interpreted, each takes seconds.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), *where.values,
            id=f"{'-'.join(map(str, case)) if isinstance(case, tuple) else case}-{where.id}",
            marks=[*where.marks, *([pytest.mark.exhaustive] if where.values[0] and case not in few else [])],
        )
        for case in cases
        for where in WHERE
    ]  # fmt: skip


def specs(batch, kv_heads, group, rows, head_dim, key, value, dtype):
    """Shapes of a query, of keys and of values.

    Each is given as slots (0: dense), as "8", "4" or "2" bits of codes, or as slots and bits, (n, 4).
    """

    def rows_spec(how, pairs):
        if isinstance(how, str):
            form = coded_format(head_dim, dtype, int(how), pairs)
        else:
            slots, bits = how if isinstance(how, tuple) else (how, 16)
            codec = codec_of("bits", bits, pruned=slots > 0)
            form = RowFormat(head_dim, np.dtype(dtype), slots or None, codec)
        return jax.eval_shape(lambda: form.empty((batch, kv_heads), rows))

    query = jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), dtype)
    return query, rows_spec(key, "channels"), rows_spec(value, "tokens")


def float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


@jax.jit
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


@jax.jit
def merge_splits(query, out, m, l):  # noqa: E741
    """Unnormalised splits, out [B * K, splits, G, H], m and l [B * K, splits, G], merged into one, as of `attend`."""
    largest = m.max(axis=1)
    weight = jnp.exp(m - largest[:, None])
    merged = (out * weight[..., None]).sum(axis=1), largest, (l * weight).sum(axis=1)
    return [x.reshape(*query.shape[:3], *x.shape[2:]) for x in merged]
