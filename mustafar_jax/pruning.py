"""Which entries of cached vectors are kept (arXiv 2505.22913, section 3), by every rule that there is."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

RECENT = 32
"""The most recent queries that rules score with, and tokens of a group along which a channel's entries compete."""

LEAST_WEIGHT = 2.0**-10
"""Of a channel, beside the largest of its head."""

WEIGHING = 512
"""The most recent queries of a prompt that entries of keys are weighed by."""

_BITS_OF: dict[np.dtype[Any], type[np.unsignedinteger[Any]]] = {
    jnp.dtype(jnp.bfloat16): np.uint16,
    jnp.dtype(jnp.float16): np.uint16,
    jnp.dtype(jnp.float32): np.uint32,
}


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise ValueError unless `sparsity`, the fraction removed, lies in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name}={sparsity} must be the fraction removed, in [0, 1)")


def keep_count(size: int, sparsity: float) -> int:
    """Entries that a vector of `size` keeps: the smallest multiple of 4 that is >= (1 - sparsity) * size.

    At least 4. 128 at 0.7 gives 40 (a true sparsity of 0.6875). Raises ValueError for a sparsity outside [0, 1).
    """
    check_sparsity("sparsity", sparsity)
    wanted = round((1 - sparsity) * size, 6)  # (1 - 0.7) * 40 is 12.000000000000002 in binary floating point
    return max(4, 4 * math.ceil(wanted / 4))


def magnitude_mask(x: jax.Array, sparsity: float, *, axis: int = -1) -> jax.Array:
    """Keep the largest magnitudes along an axis: the paper's per-token rule when `axis` is head_dim.

    Args:
        x: bfloat16, float16 or float32, any shape.
        sparsity: the fraction removed, in [0, 1).
        axis: the axis whose entries compete.

    Returns:
        bool of x's shape, True where kept, with exactly `keep_count(x.shape[axis], sparsity)` True along `axis` (all,
        where that is more than there are). Of equal magnitudes the lowest index wins. Magnitudes are compared on their
        bits: subnormals count, NaN ranks above infinity, and all NaN are equal.

    Raises:
        ValueError: sparsity outside [0, 1).
        TypeError: a dtype other than the three.
    """
    size = x.shape[axis]
    kept = min(size, keep_count(size, sparsity))
    return jnp.moveaxis(largest(magnitude_bits(jnp.moveaxis(x, axis, -1)), kept), -1, axis)


class Context(NamedTuple):
    """What a rule may see besides the entries [B, K, n, H] that it chooses from.

    Attributes:
        valid: bool [B, n], which tokens there are, in whole groups of 32.
        queries: float32 [B, K, Q, H], the last 32 queries of each query head that shares a KV head; zero where there
            is none yet. None unless the rule needs them.
        attention: float32 [B, K, n], the attention probability that those queries give to each token, summed. None
            unless the rule needs it.
    """

    valid: jax.Array
    queries: jax.Array | None = None
    attention: jax.Array | None = None


def magnitude(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """The largest magnitudes of each token's vector (section 3)."""
    return magnitude_mask(x, sparsity)


def output_aware(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """The largest |x| * sum of |query| of each key, over the last 32 queries of its query heads (section 3.1)."""
    assert context.queries is not None
    weight = jnp.sum(jnp.abs(context.queries), axis=2, keepdims=True)
    return magnitude_mask(x.astype(jnp.float32) * weight, sparsity)


def channel_magnitude(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """The largest magnitudes of each channel, within groups of 32 tokens (section 3.2)."""
    groups = x.reshape(*x.shape[:2], x.shape[2] // RECENT, RECENT, x.shape[-1]).swapaxes(-2, -1)
    mask = largest(magnitude_bits(groups), _channel_count(sparsity))
    return mask.swapaxes(-2, -1).reshape(x.shape)


def channel_output_aware(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """The largest |x| * attention of each channel, within groups of 32 tokens (section 3.2)."""
    assert context.attention is not None
    return channel_magnitude(x.astype(jnp.float32) * context.attention[..., None], sparsity, context)


def think_keys(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """Whole channels, by ||queries of the channel|| * ||its keys||, of the tokens compressed at once (2407.21018)."""
    assert context.queries is not None
    return _whole_channels(x, jnp.sum(context.queries**2, axis=2), sparsity, context)


def think_values(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """Whole channels by their norm: ThinK for values, which arXiv 2505.22913 compares with (its code's "ThinV")."""
    return _whole_channels(x, jnp.float32(1), sparsity, context)


def two_of_four(x: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """The two largest magnitudes of every four neighbouring channels (2:4 semi-structured sparsity, 2104.08378)."""
    fours = x.reshape(*x.shape[:-1], x.shape[-1] // 4, 4)
    return largest(magnitude_bits(fours), 2).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Method:
    """A rule, and what a cache must know to use it.

    Attributes:
        mask: entries [B, K, n, H], the fraction to remove, context -> bool [B, K, n, H], True where kept; n a multiple
            of 32.
        needs_queries: whether it reads `context.queries`.
        needs_attention: whether it reads `context.attention`.
        equal_rows: whether every token keeps the same number of entries, `keep_count`; if not, every channel of 32
            tokens does, and a token may keep any number.
        only: the one sparsity that the rule has; None where it takes any.
        by_group: whether it chooses from 32 tokens as it does from all, so that devices with parts of the tokens agree.
    """

    mask: Callable[[jax.Array, float, Context], jax.Array]
    needs_queries: bool = False
    needs_attention: bool = False
    equal_rows: bool = True
    only: float | None = None
    by_group: bool = True

    def slots(self, head_dim: int, sparsity: float) -> int:
        """Entries that every row has room for, whatever the mask."""
        return keep_count(head_dim, sparsity) if self.equal_rows else head_dim

    def kept(self, head_dim: int, sparsity: float) -> float:
        """The fraction of entries that the masks keep."""
        if self.equal_rows:
            return min(1.0, keep_count(head_dim, sparsity) / head_dim)  # a head_dim may be no multiple of 4
        return _channel_count(sparsity) / RECENT


KEY_METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude),
    "output_aware": Method(output_aware, needs_queries=True),
    "think": Method(think_keys, needs_queries=True, by_group=False),
    "2:4": Method(two_of_four, only=0.5),
}
"""The rules for keys by name, as `CompressionConfig.k_method` takes them."""

VALUE_METHODS: dict[str, Method] = {
    "magnitude": Method(magnitude),
    "channel_magnitude": Method(channel_magnitude, equal_rows=False),
    "channel_output_aware": Method(channel_output_aware, needs_attention=True, equal_rows=False, by_group=False),
    "think": Method(think_values, by_group=False),
    "2:4": Method(two_of_four, only=0.5),
}
"""The rules for values by name, as `CompressionConfig.v_method` takes them."""


def query_norm(query: jax.Array, counted: jax.Array, kv_heads: int) -> jax.Array:
    """The L2 norm of queries by channel, float32 [B, K, H], over tokens and the query heads of each KV head.

    Args:
        query: [B, S, N, H] after RoPE.
        counted: bool [B, S], which of them there are; the others may be anything. Entries that are not finite are not
            counted either.
        kv_heads: K; each has N // K query heads.
    """
    group = query.shape[2] // kv_heads
    heads = query.reshape(*query.shape[:2], kv_heads, group, query.shape[3]).astype(jnp.float32)
    heads = jnp.where(counted[:, :, None, None, None] & jnp.isfinite(heads), heads, 0)
    # relative to the largest, so that squares neither over- nor underflow
    largest = jnp.max(jnp.abs(heads), axis=(1, 3), keepdims=True, initial=0)
    total = jnp.sum((heads / jnp.where(largest > 0, largest, 1)) ** 2, axis=(1, 3))
    return largest[:, 0, :, 0] * jnp.sqrt(total)


def query_weight(norm: jax.Array) -> jax.Array:
    """What the entries of keys are weighed by when they are ranked: sqrt(RMS of queries), by channel.

    An entry that is dropped changes a query's score by their product, so a channel that queries use much matters more.
    The RMS itself would be that product's; its root was found to rank better (docs/quality.md).

    Args:
        norm: [B, K, H], as `query_norm` gives it.

    Returns:
        float32 [B, K, H], the largest of each head 1, so that weighing overflows no dtype; all 1 where the norms are 0.
        At least 2**-10: a channel that no query used yet still counts beside others like it.
    """
    most = jnp.max(norm, axis=-1, keepdims=True)
    weight = jnp.sqrt(norm / jnp.where(most > 0, most, 1))
    return jnp.where(most > 0, jnp.maximum(weight, LEAST_WEIGHT), 1)


def rescale_to_norm(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Scale the kept entries of each vector to the whole vector's L2 norm.

    Args:
        x: [..., H].
        mask: bool of x's shape.

    Returns:
        [..., H] in x's dtype: where kept, the entry times ||x|| / ||kept||, computed in float32 and clipped to the
        dtype's largest finite value; where the kept norm is 0 or a norm is not finite, the entry itself. Not kept: as
        it was.
    """
    x32 = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x32, axis=-1, keepdims=True)
    kept_norm = jnp.linalg.norm(jnp.where(mask, x32, 0), axis=-1, keepdims=True)
    usable = (kept_norm > 0) & jnp.isfinite(norm) & jnp.isfinite(kept_norm)
    limit = float(jnp.finfo(x.dtype).max)
    scaled = jnp.clip(x32 * (norm / jnp.where(usable, kept_norm, 1)), -limit, limit)
    return jnp.where(mask & usable, scaled.astype(x.dtype), x)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers that order as |x| does, all NaN being one value above infinity."""
    if x.dtype not in _BITS_OF:
        raise TypeError(f"x has dtype {x.dtype}; wanted bfloat16, float16 or float32")
    unsigned = _BITS_OF[x.dtype]
    infinity = np.array(np.inf, x.dtype).view(unsigned)  # as numpy has it: jax would report it under jax_debug_infs
    bits = lax.bitcast_convert_type(x, unsigned) & unsigned(jnp.iinfo(unsigned).max >> 1)
    return jnp.minimum(bits, infinity + unsigned(1))


def largest(bits: jax.Array, count: int, highest: int | None = None) -> jax.Array:
    """Mask of the `count` largest of `magnitude_bits` along the last axis, the lowest index first among equals."""
    threshold = kth_largest(bits, count, highest)
    above = bits > threshold
    tied = bits == threshold
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room))


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that a call outside jit does not compile its loop each time
def kth_largest(bits: jax.Array, k: int, highest: int | None = None) -> jax.Array:
    """The k-th largest along the last axis, [..., 1], found bit by bit from the highest: no sort, exact.

    The answer is the largest t that at least k entries reach; each step asks whether one more bit of t can be set.
    `highest` is the highest bit that one may have set; without it, all but that of the sign.
    """
    highest = jnp.iinfo(bits.dtype).bits - 2 if highest is None else highest

    def step(i: jax.Array | int, threshold: jax.Array) -> jax.Array:  # an integer under `jax.disable_jit`
        candidate = threshold | (jnp.array(1, bits.dtype) << jnp.asarray(highest - i, bits.dtype))
        reached = jnp.sum(bits >= candidate, axis=-1, keepdims=True) >= k
        return jnp.where(reached, candidate, threshold)

    return lax.fori_loop(0, highest + 1, step, jnp.zeros_like(bits[..., :1]))


def _channel_count(sparsity: float) -> int:
    """Tokens of a group that each channel keeps."""
    check_sparsity("sparsity", sparsity)
    return max(1, math.ceil(round((1 - sparsity) * RECENT, 6)))


def _whole_channels(x: jax.Array, weight: jax.Array, sparsity: float, context: Context) -> jax.Array:
    """Keep the channels of [B, K, n, H] whose squares, times weight [B, K, H], sum to the most over the tokens."""
    tokens = jnp.where(context.valid[:, None, :, None], x.astype(jnp.float32), 0)
    channels = magnitude_mask(jnp.sum(tokens**2, axis=2) * weight, sparsity)
    return jnp.broadcast_to(channels[:, :, None], x.shape)
