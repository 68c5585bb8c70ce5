"""The cache in a Flax NNX decoder: interleaved RoPE, grouped-query heads, sliding and global layers under nnx.scan.

The model has random weights. Without caches it is plain attention over the whole text; `Attention` shows what changes
with them. Run it with `python examples/nnx_decoder.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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

    @property
    def inv_freq(self) -> np.ndarray:
        """RoPE frequencies [H / 2]: numbers, not traced, as the cache wants them."""
        return 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)


def rope(x: Array, positions: Array, inv_freq: np.ndarray) -> Array:
    """Interleaved RoPE of [B, n, N, H] at [B, n]: channel 2 i pairs with channel 2 i + 1."""
    angles = positions[..., None, None] * inv_freq.astype(np.float32)
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def half_split(x: Array) -> Array:
    """The channels in the cache's order: channel i pairs with i + H / 2. Scores stay the same if both are permuted."""
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


class Attention(nnx.Module):
    """Grouped-query attention; `window` is None in a global layer."""

    def __init__(self, config: Config, window: int | None, rngs: nnx.Rngs) -> None:
        self.config, self.window = config, window
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, rngs=rngs)
        self.query = linear(config.hidden, (config.num_heads, config.head_dim))
        self.key = linear(config.hidden, (config.num_kv_heads, config.head_dim))
        self.value = linear(config.hidden, (config.num_kv_heads, config.head_dim))
        self.out = linear((config.num_heads, config.head_dim), config.hidden, axis=(-2, -1))

    def __call__(self, x: Array, positions: Array, lengths: Array, cache: Cache) -> tuple[Array, Cache]:
        """Attend from x [B, n, D], of which `lengths` [B] are there, padded on the right."""
        query, key = (rope(project(x), positions, self.config.inv_freq) for project in (self.query, self.key))
        if cache is not None:
            query, key = half_split(query), half_split(key)
            out, cache = mj.attend(cache, query, key, self.value(x), lengths, sliding_window=self.window)
        else:
            window = None if self.window is None else (self.window - 1, 0)
            out = jax.nn.dot_product_attention(query, key, self.value(x), is_causal=True, local_window_size=window)
        return self.out(out), cache


class Layer(nnx.Module):
    """Attention and a feed-forward network."""

    def __init__(self, config: Config, window: int | None, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, window, rngs)
        self.norms = nnx.List([nnx.RMSNorm(config.hidden, rngs=rngs) for _ in range(2)])
        self.up = nnx.Linear(config.hidden, 4 * config.hidden, rngs=rngs)
        self.down = nnx.Linear(4 * config.hidden, config.hidden, rngs=rngs)

    def __call__(self, x: Array, positions: Array, lengths: Array, cache: Cache) -> tuple[Array, Cache]:
        """[B, n, D] -> [B, n, D], and the cache with the tokens."""
        attended, cache = self.attention(self.norms[0](x), positions, lengths, cache)
        x = x + attended
        return x + self.down(jax.nn.silu(self.up(self.norms[1](x)))), cache


class Block(nnx.Module):
    """A sliding layer and a global one: windows are static, so that layers which are scanned have the same ones."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(config, window, rngs) for window in (config.window, None)])


class Decoder(nnx.Module):
    """Tokens to logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.hidden, rngs=rngs)
        self.head = nnx.Linear(config.hidden, config.vocab, use_bias=False, rngs=rngs)
        stack = nnx.split_rngs(splits=config.blocks)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.blocks = stack(rngs)  # weights have a leading axis of blocks

    def __call__(self, tokens: Array, lengths: Array, caches: Caches = (None, None)) -> tuple[Array, Caches]:
        """New tokens [B, n], `lengths` [B] of which are there -> logits [B, n, V], and the caches with them."""
        start = jnp.zeros_like(lengths) if caches[0] is None else caches[0].lengths[0]
        positions = start[:, None] + jnp.arange(tokens.shape[1])

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        def run(carry: tuple[Array, Caches], block: Block, i: Array) -> tuple[Array, Caches]:
            # Caches are carried, and a block's are cut out and written back: as inputs and outputs of the scan
            # (in_axes=0, out_axes=0) all of them would be copied, several times.
            x, stacked = carry
            new = []
            for layer, cache in zip(block.layers, take(stacked, i), strict=True):
                x, cache = layer(x, positions, lengths, cache)
                new.append(cache)
            return x, put(stacked, tuple(new), i)

        x, caches = run((self.embed(tokens), caches), self.blocks, jnp.arange(self.config.blocks))
        return self.head(x), caches


def take(stacked: Any, i: Array) -> Any:
    """The caches of a block, of stacked ones."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)


def put(stacked: Any, new: Any, i: Array) -> Any:
    """The stacked caches with those of a block in their place."""
    return jax.tree.map(lambda leaf, one: lax.dynamic_update_index_in_dim(leaf, one, i, axis=0), stacked, new)


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


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="caches")
def generate(
    model: Decoder, tokens: Array, lengths: Array, caches: Caches, *, steps: int
) -> tuple[Array, Array, Caches]:
    """The likeliest tokens [B, steps] after new ones [B, n], padded on the right, their logits, and the caches."""
    graph, state = nnx.split(model)
    logits, caches = model(tokens, lengths, caches)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]

    def step(carry: tuple[Array, Caches], _: None) -> tuple[tuple[Array, Caches], tuple[Array, Array]]:
        last, caches = carry
        token = last.argmax(-1)
        model = nnx.merge(graph, state, copy=True)  # nnx.scan wants variables of this trace
        logits, caches = model(token[:, None], jnp.ones_like(token), caches)
        return (logits[:, 0], caches), (token, last)

    (_, caches), (written, logits) = lax.scan(step, (last, caches), length=steps)
    return written.T, logits.swapaxes(0, 1), caches


def main() -> None:
    """Two turns of two sequences."""
    config, lengths = Config(), jnp.array([120, 75])
    model = Decoder(config, nnx.Rngs(0))
    caches = init_caches(config, mj.CompressionConfig.preset("fast"), batch=2, capacity=256)
    tokens = jax.random.randint(jax.random.key(1), (2, 120), 0, config.vocab)
    for turn in (tokens, tokens[:, :30]):
        written, _, caches = generate(model, turn, jnp.minimum(lengths, turn.shape[1]), caches, steps=16)
        print(written)
    held = [cache for cache in caches if cache is not None]
    print(f"{sum(c.nbytes for c in held):,} bytes held, {sum(c.dense_nbytes for c in held):,} in dense caches")


if __name__ == "__main__":
    main()
