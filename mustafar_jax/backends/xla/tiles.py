"""Attention of any queries to any tokens, a tile of both at a time, merged as in flash decoding."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mustafar_jax.backend import Attended
from mustafar_jax.operands import DenseAttention, PackedAttention, PromptAttention
from mustafar_jax.sharding import varying_as

TILE = 128
"""Tokens that are unpacked at a time for the queries of one token; a multiple of 32."""

QUERIES = 512
"""Of several tokens, those that are attended at a time."""

SCORES = 2**24
"""Scores that are held at a time for several tokens, unless the smallest tile has more."""


class Partial(NamedTuple):
    """Attention over some of the tokens: what flash decoding keeps of a split.

    Attributes:
        out: float32 [B, K, Q, H], the sum of exp(score - m) * value.
        m: float32 [B, K, Q], the largest score; the lowest float32 where no token was visible.
        l: float32 [B, K, Q], the sum of exp(score - m).
    """

    out: jax.Array
    m: jax.Array
    l: jax.Array  # noqa: E741


class Queries(NamedTuple):
    """Queries of one token of each sequence, or of several, token after token.

    Attributes:
        array: [B, K, Q, H], Q = n * G.
        position: int32 [B or 1, n].
    """

    array: jax.Array
    position: jax.Array

    @property
    def tokens(self) -> int:
        """n."""
        return self.position.shape[1]

    @property
    def tile(self) -> int:
        """How many keys to attend to at a time; a power of two from `TILE` on."""
        if self.tokens == 1:
            return TILE
        most = min(8 * TILE, max(TILE, SCORES // (self.array.size // self.array.shape[-1])))
        return 1 << most.bit_length() - 1

    def within(self, window: int | None, position: jax.Array) -> jax.Array:
        """bool [B or 1, n, T]: which of the keys at positions [B or 1, T] stand in each query's window, or after it."""
        distance = self.position[..., None] - position[:, None]
        return jnp.ones_like(distance, bool) if window is None else distance < window


class Scoring(NamedTuple):
    """How a score comes of a query and a key. Static.

    Attributes:
        scale, soft_cap: as in `PromptAttention`.
        precision: of products with keys and with values.
    """

    scale: float
    soft_cap: float | None
    precision: lax.Precision = lax.Precision.HIGHEST

    @classmethod
    def of(cls, operands: PromptAttention | DenseAttention | PackedAttention, *, tokens: int) -> "Scoring":
        """That of the queries of so many tokens.

        Several 16-bit tokens are multiplied as the device likes to: a GPU rounds float32 operands to TF32 then, which
        has float16's 11 significant bits, and takes a tenth of the time.
        """
        is_exact = tokens == 1 or operands.query.dtype == jnp.float32
        precision = lax.Precision.HIGHEST if is_exact else lax.Precision.DEFAULT
        return cls(operands.scale, operands.soft_cap, precision)

    def scores(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """float32 [B, K, Q, T] of [B, K, Q, H] and [B, K, T, H]."""
        both = query.astype(jnp.float32), key.astype(jnp.float32)
        scores = jnp.einsum("bkqh,bkth->bkqt", *both, precision=self.precision) * self.scale
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the tokens of both."""
    m = jnp.maximum(a.m, b.m)
    weight_a, weight_b = jnp.exp(a.m - m), jnp.exp(b.m - m)
    out = a.out * weight_a[..., None] + b.out * weight_b[..., None]
    return Partial(out, m, a.l * weight_a + b.l * weight_b)


def attend_tile(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, scoring: Scoring) -> Partial:
    """Attention over one tile.

    Args:
        query: [B, K, n * G, H], of n tokens.
        key, value: [B, K, T, H]; whatever stands at tokens that no query sees, NaN too, has no effect.
        visible: bool [B or 1, n, T].
        scoring: see above.
    """
    seen = jnp.repeat(visible, query.shape[2] // visible.shape[1], axis=1)[:, None]  # alike for a token's queries
    scores = jnp.where(seen, scoring.scores(query, key), jnp.finfo(jnp.float32).min)
    m = scores.max(axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - m[..., None]), 0)
    # A weight of 0 does not silence a NaN value; the value itself must go.
    value = jnp.where(visible.any(axis=1)[:, None, :, None], value, 0).astype(jnp.float32)
    out = jnp.einsum("bkqt,bkth->bkqh", weights, value, precision=scoring.precision)
    return Partial(out, m, weights.sum(axis=-1))


def over_tiles(
    attend: Callable[[jax.Array, jax.Array], Partial],
    see: Callable[[jax.Array], jax.Array],
    keys: int,
    tile: int,
    empty: Partial,
) -> Partial:
    """Attention over tiles of keys, skipping those in which no query sees one.

    The skip also keeps each tile's conversion to float32 inside the loop: XLA for CPUs would otherwise hoist the
    conversion of the whole bfloat16 cache out of it.

    Args:
        attend: the start of a tile, bool [B or 1, n, tile] -> attention to those that are visible.
        see: the numbers of keys, int32 [1, tile] -> which of them are visible.
        keys: how many there are.
        tile: how many are taken at a time, at most `keys`.
        empty: attention to none.
    """

    def step(i: jax.Array, partial: Partial) -> Partial:
        start = jnp.minimum(i * tile, keys - tile)  # the last one is moved back to end with the keys
        number = start + jnp.arange(tile)[None]
        visible = see(number) & (number >= i * tile)[:, None]
        return lax.cond(visible.any(), lambda p: merge(p, attend(start, visible)), lambda p: p, partial)

    return lax.fori_loop(0, -(-keys // tile), step, empty)


def over_keys(
    queries: Queries, key: jax.Array, value: jax.Array, see: Callable[[jax.Array], jax.Array], scoring: Scoring
) -> Partial:
    """Attention over keys and values [B, S, K, H], a tile at a time, so that no copy of all in float32 is made."""
    tile = min(queries.tile, key.shape[1])

    def attend(start: jax.Array, visible: jax.Array) -> Partial:
        keys, values = (lax.dynamic_slice_in_dim(x, start, tile, axis=1).swapaxes(1, 2) for x in (key, value))
        return attend_tile(queries.array, keys, values, visible, scoring)

    return over_tiles(attend, see, key.shape[1], tile, varying_as(nothing(queries), key, value))


def in_parts(attend: Callable[[Queries], Partial], queries: Queries) -> Partial:
    """Attention of queries, those of so many tokens at a time that not too many scores are held.

    The last part is moved back to end with the tokens, so that every part has the same shape.
    """
    tokens, group = queries.tokens, queries.array.shape[2] // queries.tokens
    scores_of_token = queries.array.shape[0] * queries.array.shape[1] * group * TILE
    part = min(tokens, QUERIES, max(16, SCORES // scores_of_token))
    if part == tokens:
        return attend(queries)

    def run(start: jax.Array) -> Partial:
        array = lax.dynamic_slice_in_dim(queries.array, start * group, part * group, axis=2)
        return attend(Queries(array, lax.dynamic_slice_in_dim(queries.position, start, part, axis=1)))

    parts = lax.map(run, jnp.minimum(jnp.arange(0, tokens, part), tokens - part))  # [parts, B, K, part * G, ..]

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        body = x[:, :, :-1].reshape(*x.shape[:2], -1, *x.shape[4:])
        return jnp.concatenate([body, x[:, :, -1, body.shape[2] + (part - tokens) * group :]], axis=2)

    return jax.tree.map(join, parts)


def nothing(queries: Queries) -> Partial:
    """Attention over no token."""
    zeros = jnp.zeros_like(queries.array, jnp.float32)
    empty = Partial(zeros, jnp.full_like(zeros[..., 0], jnp.finfo(jnp.float32).min), zeros[..., 0])
    return varying_as(empty, queries)


def finished(partial: Partial, *, return_lse: bool) -> Attended:
    """What was attended; zeros, and -inf, where no token was visible."""
    none, total = partial.l == 0, jnp.where(partial.l == 0, 1, partial.l)
    # not `l > 0`: what is not a number must not become zeros
    out = jnp.where(none[..., None], 0, partial.out / total[..., None])
    return (out, jnp.where(none, -jnp.inf, partial.m + jnp.log(total))) if return_lse else out
