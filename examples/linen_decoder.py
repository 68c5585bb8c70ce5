"""The cache in a Flax Linen decoder as Gemma 2 is: soft caps, sliding and global layers under nn.scan, left padding.

The model has random weights. Without caches it is plain attention over the whole text; `Layer` shows what changes with
them. Run it with `python examples/linen_decoder.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

import mustafar_jax as mj

Cache = mj.LayerCache | None
Caches = tuple[Cache, Cache]
"""Those of the sliding and of the global layer of each block, stacked over the blocks; None: plain attention."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model."""

    vocab: int = 256
    blocks: int = 2
    hidden: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    window: int = 48
    soft_cap: float = 20.0

    @property
    def inv_freq(self) -> np.ndarray:
        """RoPE frequencies [H / 2]: numbers, not traced, as the cache wants them."""
        return 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)


def rope(x: Array, positions: Array, inv_freq: np.ndarray) -> Array:
    """Half-split RoPE of [B, n, N, H] at [B, n]: channel i pairs with channel i + H / 2, as the cache wants it."""
    angles = positions[..., None, None] * inv_freq.astype(np.float32)
    (first, second), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def plain_attention(query: Array, key: Array, value: Array, window: int | None, soft_cap: float) -> Array:
    """Causal attention [B, S, N, H] over a whole text."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqnh,bsnh->bnqs", query, key) / query.shape[-1] ** 0.5
    scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
    visible = (distance >= 0) & (distance < (window or key.shape[1]))
    return jnp.einsum("bnqs,bsnh->bqnh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), value)


class Layer(nn.Module):
    """Attention and a feed-forward network; `window` is None in a global layer."""

    config: Config
    window: int | None

    @nn.compact
    def __call__(self, x: Array, positions: Array, lengths: Array, cache: Cache) -> tuple[Array, Cache]:
        """x [B, n, D], of which `lengths` [B] are there, padded on the right -> [B, n, D], and the cache with them."""
        config, normed = self.config, nn.RMSNorm()(x)
        project = functools.partial(nn.DenseGeneral, use_bias=False)
        query = project((config.num_heads, config.head_dim), name="query")(normed)
        key = project((config.num_kv_heads, config.head_dim), name="key")(normed)
        value = project((config.num_kv_heads, config.head_dim), name="value")(normed)
        query, key = (rope(x, positions, config.inv_freq) for x in (query, key))
        if cache is not None:
            options: mj.attention.Options = {"sliding_window": self.window, "logits_soft_cap": config.soft_cap}
            out, cache = mj.attend(cache, query, key, value, lengths, **options)
        else:
            out = plain_attention(query, key, value, self.window, config.soft_cap)
        x = x + project(config.hidden, axis=(-2, -1), name="out")(out)
        return x + nn.Dense(config.hidden)(jax.nn.silu(nn.Dense(4 * config.hidden)(nn.RMSNorm()(x)))), cache


class Block(nn.Module):
    """A sliding layer and a global one: windows are static, so that layers which are scanned have the same ones."""

    config: Config

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Caches], i: Array, positions: Array, lengths: Array
    ) -> tuple[tuple[Array, Caches], None]:
        """Caches are carried, and a block's are cut out and written back: as inputs and outputs of the scan all of them
        would be copied, several times.
        """
        x, stacked = carry
        sliding, wide = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)
        x, sliding = Layer(self.config, self.config.window, name="sliding")(x, positions, lengths, sliding)
        x, wide = Layer(self.config, None, name="global")(x, positions, lengths, wide)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=0)
        return (x, jax.tree.map(put, stacked, (sliding, wide))), None


class Decoder(nn.Module):
    """Tokens to logits."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array, caches: Caches = (None, None)) -> tuple[Array, Caches]:
        """New tokens [B, n], `lengths` [B] of which are there -> logits [B, n, V], and the caches with them."""
        start = jnp.zeros_like(lengths) if caches[0] is None else caches[0].lengths[0]
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        scan = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast, nn.broadcast)
        )
        x = nn.Embed(self.config.vocab, self.config.hidden)(tokens)
        blocks = jnp.arange(self.config.blocks)
        (x, caches), _ = scan(self.config, name="blocks")((x, caches), blocks, positions, lengths)
        return nn.Dense(self.config.vocab, use_bias=False, name="head")(x), caches


def init_caches(config: Config, compression: mj.CompressionConfig, batch: int, capacity: int) -> Caches:
    """Empty caches of all layers, stacked over the blocks."""
    shape: dict[str, Any] = {
        "batch": batch,
        "capacity": capacity,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }

    def make(_: Array) -> Cache:
        return mj.LayerCache.init(compression, **shape, dtype=jnp.float32, inv_freq=config.inv_freq)

    blocks = jnp.arange(config.blocks)
    return jax.vmap(make)(blocks), jax.vmap(make)(blocks)


def padded_on_the_right(tokens: Array, lengths: Array) -> Array:
    """Of tokens [B, n] that are padded on the left: each row is shifted until its first token stands first."""
    index = jnp.arange(tokens.shape[1]) + (tokens.shape[1] - lengths)[:, None]
    return jnp.take_along_axis(tokens, index % tokens.shape[1], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="caches")
def generate(
    model: Decoder, params: Any, tokens: Array, lengths: Array, caches: Caches, *, steps: int
) -> tuple[Array, Array, Caches]:
    """The likeliest tokens [B, steps] after new ones [B, n], padded on the left, their logits, and the caches."""
    run: Any = functools.partial(model.apply, params)
    logits, caches = run(padded_on_the_right(tokens, lengths), lengths, caches)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]

    def step(carry: tuple[Array, Caches], _: None) -> tuple[tuple[Array, Caches], tuple[Array, Array]]:
        last, caches = carry
        token = last.argmax(-1)
        logits, caches = run(token[:, None], jnp.ones_like(token), caches)
        return (logits[:, 0], caches), (token, last)

    (_, caches), (written, logits) = lax.scan(step, (last, caches), length=steps)
    return written.T, logits.swapaxes(0, 1), caches


def main() -> None:
    """Two turns of two sequences."""
    config, lengths = Config(), jnp.array([120, 75])
    model, tokens = Decoder(config), jax.random.randint(jax.random.key(1), (2, 120), 0, config.vocab)
    params = model.init(jax.random.key(0), tokens, lengths)
    caches = init_caches(config, mj.CompressionConfig.preset("fast"), batch=2, capacity=256)
    for turn in (tokens, tokens[:, -30:]):
        written, _, caches = generate(model, params, turn, jnp.minimum(lengths, turn.shape[1]), caches, steps=16)
        print(written)
    held = [cache for cache in caches if cache is not None]
    print(f"{sum(c.nbytes for c in held):,} bytes held, {sum(c.dense_nbytes for c in held):,} in dense caches")


if __name__ == "__main__":
    main()
