"""Llama in Flax NNX: Llama 2 and 3, SmolLM2, and what Mistral and Qwen add, as the model's config has it.

Modules and weights carry the names of Hugging Face checkpoints, and every kernel keeps the orientation that it has
there ([outputs, inputs], heads split in two axes), so that loading one is a reshape and never a transpose.

Letters: B sequences, S tokens, D hidden channels, N query heads, K key and value heads, H channels of a head.

Precision: weights, activations and the cache are of one dtype; RMSNorm's statistics, rotary embeddings, attention
scores and logits are computed in float32. Matrix products have JAX's default precision, which for float32 on NVIDIA
GPUs is TF32: wrap the call in `jax.default_matmul_precision("highest")` where float32 is meant to be exact.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mustafar_jax.attention import decode_attention, prefill_attention
from mustafar_jax.backends.registry import Implementation, packers
from mustafar_jax.blocks import attend
from mustafar_jax.cache import LayerCache, append, prefill
from mustafar_jax.config import CompressionConfig
from mustafar_jax.models.config import ModelConfig, rope_frequencies
from mustafar_jax.models.config_json import LLAMA_FIELDS, read_config_json
from mustafar_jax.models.fields import Field
from mustafar_jax.rope import rotate
from mustafar_jax.sharding import CacheSharding

M = TypeVar("M", bound=nnx.Module)

FEED_FORWARD_TOKENS = 16384
"""Tokens of a batch of prompts that the feed-forward network, several times as wide as the rest, takes at a time."""


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        embed, head_dim = {"embed": config.hidden_size}, {"head_dim": config.head_dim}
        heads, kv_heads = {"heads": config.num_heads}, {"kv_heads": config.num_kv_heads}
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        bias, output_bias = config.attention_bias, config.attention_output_bias
        self.q_proj = _linear("...d,nhd->...nh", heads | head_dim | embed, bias=bias, **options)
        self.k_proj = _linear("...d,khd->...kh", kv_heads | head_dim | embed, bias=bias, **options)
        self.v_proj = _linear("...d,khd->...kh", kv_heads | head_dim | embed, bias=bias, **options)
        self.o_proj = _linear("...nh,dnh->...d", embed | heads | head_dim, bias=output_bias, **options)
        if config.qk_norm:
            self.q_norm = _norm(head_dim, config, **options)
            self.k_norm = _norm(head_dim, config, **options)

    def __call__(self, hidden: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Attend causally: hidden [B, S, D], lengths [B] -> attended [B, S, D], query, key and value [B, S, K, H]."""
        query, key, value = self._project(hidden, jnp.arange(hidden.shape[1])[:, None])
        attended = prefill_attention(query, key, value, lengths, sliding_window=self.config.sliding_window)
        return self.o_proj(attended), query, key, value

    def decode(
        self, hidden: jax.Array, cache: LayerCache, implementation: Implementation
    ) -> tuple[jax.Array, LayerCache]:
        """Append one token to each sequence, and attend from it: hidden [B, D] -> [B, D]."""
        query, key, value = self._project(hidden, cache.lengths[:, None])
        cache = append(cache, key, value, query=query, implementation=packers(implementation))
        window = self.config.sliding_window
        attended = decode_attention(query, cache, sliding_window=window, implementation=implementation)
        return self.o_proj(attended), cache

    def extend(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array, implementation: Implementation
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """Attend from any number of tokens of each sequence, and add them: [B, n, D] -> [B, n, D], and queries."""
        positions = cache.lengths[:, None] + jnp.arange(hidden.shape[1])[None]
        query, key, value = self._project(hidden, positions[..., None])
        window = self.config.sliding_window
        attended, cache = attend(
            cache, query, key, value, lengths, sliding_window=window, implementation=implementation
        )
        return self.o_proj(attended), query, cache

    def _project(self, hidden: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """hidden [..., D], positions [..., 1] -> rotated query [..., N, H] and key [..., K, H], value [..., K, H]."""
        inv_freq = jnp.asarray(rope_frequencies(self.config))
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, positions, inv_freq).astype(hidden.dtype)
        return query, rotate(key, positions, inv_freq).astype(hidden.dtype), value


class MLP(nnx.Module):
    """The gated feed-forward network, SwiGLU."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        embed, inner = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        options: dict[str, Any] = {"bias": config.mlp_bias, "dtype": dtype, "rngs": rngs}
        self.gate_proj = _linear("...d,fd->...f", inner | embed, **options)
        self.up_proj = _linear("...d,fd->...f", inner | embed, **options)
        self.down_proj = _linear("...f,df->...d", embed | inner, **options)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.down_proj(nnx.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nnx.Module):
    """One decoder layer. All layers of a model are of one structure: a function jitted over one compiles once."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        embed = {"embed": config.hidden_size}
        self.input_layernorm = _norm(embed, config, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = _norm(embed, config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
        """Whole sequences from position 0 on, without a cache: hidden [B, S, D], lengths int32 [B] -> [B, S, D]."""
        return self.run_prompt(hidden, lengths)[0]

    def run_prompt(self, hidden: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Run right-padded prompts with dense attention, and give what a cache is filled with.

        Args:
            hidden: [B, S, D], the tokens at positions 0 to S - 1.
            lengths: int32 [B], each prompt's tokens; what stands after them is never attended to.

        Returns:
            The layer's output [B, S, D]; query [B, S, N, H] and key [B, S, K, H] after RoPE; value [B, S, K, H]. They
            mean nothing from `lengths` on.
        """
        attended, query, key, value = self.self_attn(self.input_layernorm(hidden), lengths)
        return self._feed_forward_in_chunks(hidden + attended), query, key, value

    def prefill(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array, *, implementation: Implementation = None
    ) -> tuple[jax.Array, LayerCache]:
        """Run right-padded prompts as `run_prompt` does, and put their keys and values into an empty cache.

        Args:
            hidden, lengths: as in `run_prompt`.
            cache: this layer's empty cache.
            implementation: as `decode` takes it; the cache is packed by `registry.packers` of it. Attention over the
                prompt is dense, and always the best that works here.

        Returns:
            The layer's output [B, S, D], meaningless from `lengths` on, and the filled cache.
        """
        hidden, query, key, value = self.run_prompt(hidden, lengths)
        return hidden, prefill(cache, key, value, lengths, query=query, implementation=packers(implementation))

    def decode(
        self, hidden: jax.Array, cache: LayerCache, *, implementation: Implementation = None
    ) -> tuple[jax.Array, LayerCache]:
        """Run one token of each sequence, at the position after those that the cache holds.

        Args:
            hidden: [B, D].
            cache: this layer's cache; the token is appended to it before it is attended to.
            implementation: as `decode_attention` takes it; the cache is packed by `registry.packers` of it.

        Returns:
            The layer's output [B, D] and the cache with one more token.
        """
        attended, cache = self.self_attn.decode(self.input_layernorm(hidden), cache, implementation)
        return self._feed_forward(hidden + attended), cache

    def extend(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array, *, implementation: Implementation = None
    ) -> tuple[jax.Array, LayerCache]:
        """Run any number of given tokens of each sequence after those that the cache holds: see `mustafar_jax.attend`.

        Args:
            hidden: [B, n, D], padded on the right.
            cache: this layer's cache, empty or filled, with room for the tokens.
            lengths: int32 [B], how many of the n tokens there are of each sequence.
            implementation: as `attend` takes it.

        Returns:
            The layer's output [B, n, D], meaningless from `lengths` on, and the cache with the tokens.
        """
        attended, _, cache = self.self_attn.extend(self.input_layernorm(hidden), cache, lengths, implementation)
        return self._feed_forward_in_chunks(hidden + attended), cache

    def run_chunk(
        self, hidden: jax.Array, cache: LayerCache, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """`extend` of a dense cache, which holds the prompts' earlier chunks; gives the queries [B, n, N, H], too."""
        attended, query, cache = self.self_attn.extend(self.input_layernorm(hidden), cache, lengths, None)
        return self._feed_forward_in_chunks(hidden + attended), query, cache

    def _feed_forward_in_chunks(self, hidden: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, D], some tokens at a time, each chunk in the place of its input."""
        batch, length, _ = hidden.shape
        chunk = min(length, max(1, FEED_FORWARD_TOKENS // batch))

        def run(hidden: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
            part = lax.dynamic_slice_in_dim(hidden, start, size, axis=1)
            return lax.dynamic_update_slice_in_dim(hidden, self._feed_forward(part), start, axis=1)

        if chunk == length:
            return self._feed_forward(hidden)
        chunks, rest = divmod(length, chunk)
        hidden = lax.fori_loop(0, chunks, lambda i, hidden: run(hidden, i * chunk, chunk), hidden)
        return run(hidden, chunks * chunk, rest) if rest else hidden

    def _feed_forward(self, hidden: jax.Array) -> jax.Array:
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nnx.Module):
    """A Llama-type language model; other families are classes of their own, which differ in what is said here of them.

    Attributes:
        architecture: what config.json calls a model of the family.
        fields: what config.json holds of one.
        always: what `ModelConfig` holds of every one, and no file says.

    Args:
        config: the model's shape.
        dtype: of weights, activations and caches: bfloat16, float16 or float32.
        rngs: random numbers for the initial weights; `mustafar_jax.models.load` fills them from a checkpoint.
    """

    architecture: ClassVar[str] = "LlamaForCausalLM"
    fields: ClassVar[Mapping[str, Field]] = LLAMA_FIELDS
    always: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(0.02),
            embedding_metadata=_logical_axes("vocab", "embed"),
            rngs=rngs,
        )
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm({"embed": config.hidden_size}, config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            axes = {"vocab": config.vocab_size, "embed": config.hidden_size}
            self.lm_head = _linear("...d,vd->...v", axes, dtype=dtype, rngs=rngs)

    @classmethod
    def read_config(cls, fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """The description that config.json (and generation_config.json) gives; ValueError for what is unsupported."""
        return dataclasses.replace(read_config_json(cls.fields, fields, generation), **cls.always)

    def __call__(self, tokens: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Logits of whole sequences, without a cache.

        Args:
            tokens: int32 [B, S], right-padded.
            lengths: int32 [B]; None means that every sequence is S long.

        Returns:
            float32 [B, S, vocab_size], meaningless from `lengths` on.
        """
        if lengths is None:
            lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, lengths)
        return self.logits(hidden)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Integer tokens [...], 0 .. vocab_size - 1 -> hidden [..., D]; tokens from vocab_size on give NaN."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The last layer's output [..., D] -> float32 [..., vocab_size], through the final norm and the head."""
        head = self.embed_tokens.embedding if self.config.tie_word_embeddings else self.lm_head.kernel
        return jnp.einsum("...d,vd->...v", self.norm(hidden), head[...], preferred_element_type=jnp.float32)

    def init_cache(
        self,
        config: CompressionConfig,
        *,
        batch: int,
        capacity: int,
        dtype: DTypeLike | None = None,
        sharding: CacheSharding | None = None,
    ) -> tuple[LayerCache, ...]:
        """One empty cache per layer, for `batch` sequences of up to `capacity` tokens, of the model's dtype if None."""
        options: dict[str, Any] = {
            "batch": batch,
            "capacity": capacity,
            "num_heads": self.config.num_heads,
            "num_kv_heads": self.config.num_kv_heads,
            "head_dim": self.config.head_dim,
            "dtype": self.dtype if dtype is None else dtype,
            "inv_freq": rope_frequencies(self.config),
            "sharding": sharding,
        }
        return tuple(LayerCache.init(config, **options) for _ in self.layers)


def _linear(equation: str, axes: dict[str, int], *, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Einsum:
    """A linear map; `axes` are the logical names and sizes of its kernel's axes, in the equation's order."""
    kernel, output = equation.split(",")[1].split("->")
    bias_axes = {name: axes[name] for letter, name in zip(kernel, axes, strict=True) if letter in output}
    return nnx.Einsum(
        equation,
        tuple(axes.values()),
        tuple(bias_axes.values()) if bias else None,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
        kernel_metadata=_logical_axes(*axes),
        bias_metadata=_logical_axes(*bias_axes),
    )


def _norm(axis: dict[str, int], config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """An RMSNorm over the last axis, whose logical name and size `axis` gives."""
    [size] = axis.values()
    return nnx.RMSNorm(
        size,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=dtype,
        scale_metadata=_logical_axes(*axis),
        rngs=rngs,
    )


def _logical_axes(*names: str) -> dict[str, Any]:
    """Metadata that names a parameter's axes; `sharding.AXES` maps the names to a mesh when weights are placed."""
    # Eager sharding would want a mesh as soon as the parameter is created.
    return {"out_sharding": names, "eager_sharding": False}


def shapes_of(make: Callable[[], M]) -> M:
    """The model that a function makes, with shapes in place of weights; whatever mesh `jax.set_mesh` names."""
    with jax.set_mesh(Mesh(np.empty((), object), ())):  # Flax looks for the parameters' axes in a mesh that is set
        return nnx.eval_shape(make)


def feed_forward_nbytes(config: ModelConfig, tokens: int, dtype: DTypeLike) -> int:
    """Bytes that the feed-forward network works in, when `tokens` tokens of prompts pass it.

    Three inner activations of the tokens that it takes at a time (`FEED_FORWARD_TOKENS`).
    """
    return 3 * config.intermediate_size * min(tokens, FEED_FORWARD_TOKENS) * jnp.dtype(dtype).itemsize
