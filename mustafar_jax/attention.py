"""Attention on a `LayerCache` and over prompts, by the backend that is named, or the best that works here."""

import functools
import math
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mustafar_jax.backend import Attended, OperationName
from mustafar_jax.backends import registry
from mustafar_jax.backends.registry import Candidates, Implementation, candidates
from mustafar_jax.backends.xla.prompt import CHUNK
from mustafar_jax.cache import DenseCache, LayerCache, PackedCache
from mustafar_jax.cache.base import check_cache
from mustafar_jax.cache.dealing import merged
from mustafar_jax.cache.devices import each_device, each_device_typed
from mustafar_jax.cache.filling import PROMPT, TOKEN
from mustafar_jax.operands import DenseAttention, PackedAttention, PromptAttention


class Scores(NamedTuple):
    """What a score is besides query . key. Hashable: static under `jax.jit`.

    Attributes:
        scale: factor on it.
        window: the query at position p sees positions s with p - s < window; all if None.
        soft_cap: a score x counts as soft_cap * tanh(x / soft_cap); as it is if None.
    """

    scale: float
    window: int | None
    soft_cap: float | None

    @classmethod
    def of(cls, head_dim: int, scale: float | None, sliding_window: Any, logits_soft_cap: Any) -> "Scores":
        """From the arguments of `decode_attention`; ValueError for one that is out of its range, or traced."""
        check_window(sliding_window)
        factor = 1 / math.sqrt(head_dim) if scale is None else _number("scale", scale, "a number", least=-math.inf)
        soft_cap = logits_soft_cap
        if soft_cap is not None:
            soft_cap = _number("logits_soft_cap", soft_cap, "a positive number", least=0)
        return cls(factor, sliding_window, soft_cap)


class Options(TypedDict, total=False):
    """What functions that attend take besides, to a type checker."""

    scale: float | None
    sliding_window: int | None
    logits_soft_cap: float | None
    implementation: Implementation


@overload
def decode_attention(
    query: jax.Array, cache: LayerCache, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> jax.Array: ...


@overload
def decode_attention(
    query: jax.Array, cache: LayerCache, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array]: ...


def decode_attention(
    query: jax.Array,
    cache: LayerCache,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Attended:
    """Attend the last token of each sequence to its cache, in which it already is.

    Args:
        query: [B, N, H] after RoPE, N a multiple of the cache's KV heads; query head n reads KV head n // (N / K).
        cache: the cache, with the query's own token appended; a sequence of length 0 yields zeros.
        scale: factor on the scores, 1 / sqrt(H) if None.
        sliding_window: the query at position p sees positions s with p - s < sliding_window; all if None.
        logits_soft_cap: a score x, scaled, counts as cap * tanh(x / cap), as in Gemma 2 (arXiv 2408.00118, section 2);
            as it is if None.
        return_lse: whether to give the log-sum-exp of the scores, too, by which attention to several sets of tokens can
            be merged.
        implementation: "mosaic_gpu", "triton", "cudnn" or "xla", a sequence of names (the first that can run this is
            taken), or None for the best that works here. On NVIDIA GPUs, for bfloat16 and float16: "cudnn" for dense
            caches; for packed ones "mosaic_gpu" on compute capability 9.0 (Hopper), else "triton"; with a cap, or
            the log-sum-exp on dense caches, "xla". `mustafar_jax.explain` says what is taken without these, and why not
            another.

    Returns:
        [B, N, H] in the query's dtype; with `return_lse` that and float32 [B, N], -inf for a sequence of length 0.

    Raises:
        ValueError: shapes that do not fit, sliding_window < 1, a cap that is no positive number, an unknown
            implementation.
        TypeError: a query that is not floating-point.
        NotImplementedError: no implementation that was named can run this.
    """
    check_cache(cache)
    check_query(query, cache, (cache.batch,), "[{}, N, {}]")
    scores = Scores.of(cache.head_dim, scale, sliding_window, logits_soft_cap)
    chosen = candidates(operation_of(cache), implementation)
    with jax.named_scope("decode_attention"):  # a profile shows it by this name
        how = scores, return_lse, chosen
        results = (TOKEN, TOKEN[:2]) if return_lse else TOKEN
        out: Attended = each_device(_decode_part, cache, (query,), how, axes=(TOKEN,), results=results)
    return out


def _decode_part(cache: LayerCache, query: jax.Array, scores: Scores, return_lse: bool, chosen: Candidates) -> Attended:
    """See `decode_attention`."""
    grouped = query.reshape(cache.batch, cache.num_kv_heads, -1, cache.head_dim)
    out = _decode(grouped, cache, scores, return_lse, chosen)
    if not return_lse:
        return out.reshape(query.shape).astype(query.dtype)
    return out[0].reshape(query.shape).astype(query.dtype), out[1].reshape(query.shape[:2])


@overload
def prefill_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> jax.Array: ...


@overload
def prefill_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]: ...


def prefill_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Attended:
    """Causal attention over a prompt, padded on the right; dense.

    Args:
        query: [B, S, N, H].
        key, value: [B, S, K, H].
        lengths: int32 [B], valid tokens; the keys and values of what follows them, NaN too, have no effect.
        scale: factor on the scores, 1 / sqrt(H) if None.
        sliding_window, logits_soft_cap, return_lse: as in `decode_attention`.
        implementation: "cudnn" (NVIDIA GPUs, bfloat16 and float16, no cap, no log-sum-exp), "xla", a sequence of names
            (the first that can run this is taken), or None for the best that works here.

    Returns:
        [B, S, N, H] in the query's dtype; with `return_lse` that and float32 [B, S, N]. Rows of padding hold nothing of
        use.

    Raises:
        ValueError: sliding_window < 1, a cap that is no positive number, an unknown implementation.
        NotImplementedError: no implementation that was named can run this.
    """
    scores = Scores.of(query.shape[-1], scale, sliding_window, logits_soft_cap)
    out = each_device_typed(
        _prefill,
        (query, key, value, lengths),
        (scores, return_lse, candidates("attend_prompt", implementation)),
        axes=(PROMPT, PROMPT, PROMPT, ("batch",)),
        results=(PROMPT, PROMPT[:3]) if return_lse else PROMPT,
    )
    return (out[0].astype(query.dtype), out[1]) if return_lse else out.astype(query.dtype)


@functools.partial(jax.jit, static_argnames=("scores", "return_lse", "chosen"))
def _prefill(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    scores: Scores,
    return_lse: bool,
    chosen: Candidates,
) -> Any:
    return attend_prompt(query, key, value, lengths, scores, return_lse, chosen)


def attend_prompt(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    scores: Scores,
    return_lse: bool,
    chosen: Candidates,
) -> Any:
    """See `prefill_attention`, whose arguments have been checked; float32 where a backend gives that."""
    valid = jnp.arange(query.shape[1])[None] < lengths[:, None]
    value = jnp.where(valid[..., None, None], value, 0)  # a weight of 0 does not silence padding that is NaN
    operands = PromptAttention(query, key, value, scores.scale, scores.window, scores.soft_cap, return_lse)
    return registry.run("attend_prompt", operands, chosen)


@functools.partial(jax.jit, static_argnames=("scores", "return_lse", "chosen"))
def _decode(query: jax.Array, cache: LayerCache, scores: Scores, return_lse: bool, chosen: Candidates) -> Any:
    return attend_held(query, cache, scores, return_lse, chosen)


def attend_held(
    query: jax.Array, cache: LayerCache, scores: Scores, return_lse: bool, chosen: Candidates, *, new: int = 0
) -> Any:
    """Queries [B, K, Q, H] on what a cache holds, on all devices where its tokens are dealt to several."""
    shared = cache.dealt.count > 1
    operands = decode_operands(query, cache, *scores, return_lse=return_lse or shared, new=new)
    out = registry.run(operation_of(cache), operands, chosen)
    if not shared:
        return out
    assert cache.sharding is not None
    assert cache.sharding.context is not None
    out, lse = out
    out, lse = merged(out, lse, cache.sharding.context)
    return (out, lse) if return_lse else out


def operation_of(cache: LayerCache) -> OperationName:
    """What a backend does to attend to such a cache."""
    return "attend_dense" if isinstance(cache, DenseCache) else "attend_packed"


def decode_operands(
    query: jax.Array,
    cache: LayerCache,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    *,
    return_lse: bool = False,
    new: int = 0,
) -> DenseAttention | PackedAttention:
    """What a backend is given to attend queries [B, K, Q, H] to a cache; see `DenseAttention` for `new`."""
    how: dict[str, Any] = {"soft_cap": soft_cap, "return_lse": return_lse, "new": new}
    if window is not None and cache.dealt.count > 1:
        raise ValueError(f"sliding_window={window}, but tokens are dealt to {cache.dealt.count} devices; wanted None")
    if isinstance(cache, DenseCache):
        return DenseAttention(query, cache.key, cache.value, cache.dealt.held(cache.lengths), scale, window, **how)
    assert isinstance(cache, PackedCache)
    return PackedAttention(
        query,
        cache.keys.packed,
        cache.values.packed,
        *cache.own(),
        cache.mean,
        scale,
        window,
        cache.config.rotate_keys,
        cache.config.rotate_values,
        **how,
    )


def check_query(query: jax.Array, cache: LayerCache, leading: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless a query is [*leading, N, H] for a cache, in words `letters`; TypeError for integers."""
    if query.shape[:-2] != leading or query.ndim != len(leading) + 2 or query.shape[-1] != cache.head_dim:
        wanted = letters.format(*leading, cache.head_dim)
        raise ValueError(f"query has shape {query.shape}; the cache wants {wanted}")
    if query.shape[-2] % cache.num_kv_heads or query.shape[-2] == 0:
        raise ValueError(f"query has {query.shape[-2]} heads; wanted a multiple of the cache's {cache.num_kv_heads}")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query has dtype {query.dtype}; wanted a floating-point one")


def check_window(sliding_window: Any) -> None:
    """Raise ValueError unless it is an integer of at least 1, or None."""
    if sliding_window is not None and (not isinstance(sliding_window, int | np.integer) or sliding_window < 1):
        raise ValueError(f"{sliding_window=} must be an integer of at least 1, or None")


def _number(name: str, given: Any, wanted: str, *, least: float) -> float:
    """An argument as a float; ValueError unless it is a concrete real number, finite and above `least`."""
    traced = isinstance(given, jax.core.Tracer)
    kind = getattr(given, "dtype", np.result_type(type(given)) if isinstance(given, int | float) else None)
    is_real = kind is not None and (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer))
    if traced or not is_real or np.ndim(given) or not least < given < math.inf:
        raise ValueError(f"{name}={given!r} must be {wanted}, or None" + "; it is compiled in" * traced)
    return float(given)


def prefill_attention_nbytes(
    tokens: int, length: int, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> int:
    """Bytes that attention over prompts of `length` tokens, `tokens` in all, works in on an NVIDIA GPU.

    Queries and outputs, keys and values once; in float32, which cuDNN does not take, also the scores of some queries
    (`prompt.CHUNK`), three times.
    """
    itemsize = jnp.dtype(dtype).itemsize
    scores = 0 if itemsize == 2 else 3 * num_heads * min(length, CHUNK)
    return tokens * itemsize * (2 * (num_heads + num_kv_heads) * head_dim + scores)
