"""Prompts through a model or one of its layers, into its caches."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.backends.registry import Implementation, Names, check_implementation
from mustafar_jax.cache import LayerCache
from mustafar_jax.generation.chunks import prefill_chunks
from mustafar_jax.generation.programs import LastPrograms, last_programs
from mustafar_jax.generation.protocols import Caches, Layer, Model, Progress, TurnLayer

PREFILL_TOKENS = 65536
"""Tokens of a batch of prompts that are prefilled at a time, in whole prompts: what a layer makes of them is held."""


def prefill_prompt(
    model: Model,
    tokens: jax.Array,
    lengths: jax.Array,
    caches: Caches,
    *,
    implementation: Implementation = None,
    progress: Progress | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, Caches]:
    """Run prompts through the model, layer by layer, and fill the caches.

    Each layer's keys and values are pruned and packed before the next layer begins, so at most one layer's are held
    dense; and of a large batch of long prompts only some rows go at a time (`PREFILL_TOKENS`). One layer is compiled,
    and serves for all layers and rows.

    Args:
        model: the model.
        tokens: int32 [B, S], padded on the right.
        lengths: int32 [B], valid tokens.
        caches: one empty cache per layer; donated.
        implementation: as in `generate`.
        progress: called as progress(done, total) after each layer of each part of the rows.
        chunk: run so many tokens of all prompts at a time through each layer. What is compiled serves for prompts of
            any length, and attention works in less; a layer's keys, values and queries are held in full until its last
            chunk, so what is packed is that of one piece but for rounding. None: prompts in one piece.

    Returns:
        float32 [B, V], the logits after each prompt's last token, and the filled caches.

    Raises:
        ValueError: a chunk below 1.
        TypeError: a chunk that is no integer, or a model whose layers lack `run_chunk`.
    """
    if chunk is not None:
        return prefill_chunks(model, tokens, lengths, caches, chunk, check_implementation(implementation), progress)
    return _run(_prefill_rows, model, tokens, lengths, caches, implementation, progress)


def extend_prompt(
    model: Model,
    tokens: jax.Array,
    lengths: jax.Array,
    caches: Caches,
    *,
    implementation: Implementation = None,
    progress: Progress | None = None,
) -> tuple[jax.Array, Caches]:
    """Run prompts through the model after what the caches hold, layer by layer, and add them.

    Args, Returns: as `prefill_prompt`; the caches are empty or filled, and the layers such that can `extend`.
    """
    return _run(_extend_rows, model, tokens, lengths, caches, implementation, progress)


def _run(
    run_rows: LastPrograms,
    model: Model,
    tokens: jax.Array,
    lengths: jax.Array,
    caches: Caches,
    implementation: Implementation,
    progress: Progress | None,
) -> tuple[jax.Array, Caches]:
    """See `prefill_prompt`; `run_rows` is `_prefill_rows` or `_extend_rows`."""
    shards = _shards(next(iter(caches), None))
    rows, starts = _parts(tokens.shape[0] // shards, tokens.shape[1])
    filled, logits, done, names = list(caches), [], 0, check_implementation(implementation)
    for start in starts:
        whole = len(starts) == 1  # of one program less
        part, valid = (tokens, lengths) if whole else _rows_from(start, (tokens, lengths), rows, shards)
        hidden = embed(model, part)
        for i, layer in enumerate(model.layers):
            hidden, filled[i] = run_rows(layer, hidden, filled[i], valid, start, implementation=names)
            done += 1
            if progress is not None:
                jax.block_until_ready(hidden)
                progress(done, len(starts) * len(filled))
        logits.append(_last_logits(model, hidden, valid))
    return _joined(logits, len(tokens), shards), tuple(filled)


def prefill_layer(
    layer: Layer, hidden: jax.Array, cache: LayerCache, lengths: jax.Array, names: Names | None
) -> tuple[jax.Array, LayerCache]:
    """Run prompts through one layer, and fill its cache: as many rows at a time as `prefill_prompt` takes.

    Args:
        layer: one layer.
        hidden: [B, S, D].
        cache: the layer's empty cache; donated.
        lengths: int32 [B], valid tokens.
        names: who packs, as in `generate`, in a hashable form.

    Returns:
        The layer's output [B, S, D], and the filled cache.
    """
    shards = _shards(cache)
    rows, starts = _parts(hidden.shape[0] // shards, hidden.shape[1])
    parts = []
    for start in starts:
        part, valid = _rows_from(start, (hidden, lengths), rows, shards)
        part, cache = _prefill_rows(layer, part, cache, valid, start, implementation=names)
        parts.append(part)
    return _joined(parts, len(hidden), shards), cache


def _parts(batch: int, length: int) -> tuple[int, list[jax.Array]]:
    """How many rows to prefill at a time, and the first row of each part.

    The last part is moved back to end with the batch, so every part has the same shape; to fill a row twice is to
    replace it by itself.
    """
    rows = _rows_at_a_time(batch, length)
    return rows, [jax.device_put(np.int32(min(start, batch - rows))) for start in range(0, batch, rows)]


def _rows_at_a_time(batch: int, length: int) -> int:
    """How many of a batch's prompts to prefill at a time: as many as `PREFILL_TOKENS` holds, in parts of one size."""
    fit = max(1, PREFILL_TOKENS // length)
    parts = -(-batch // fit)
    return -(-batch // parts)


def prefilled_tokens(batch: int, length: int) -> int:
    """How many tokens of a batch of prompts [B, S] are prefilled at a time, at most; one prompt always goes whole."""
    return min(batch * length, max(PREFILL_TOKENS, length))


def _shards(cache: LayerCache | None) -> int:
    """Parts of the batch that different devices hold: each gives as many rows to what is prefilled at a time."""
    sharding = getattr(cache, "sharding", None)
    return 1 if sharding is None else int(sharding.size("batch"))


def _by_shard(x: jax.Array, shards: int) -> jax.Array:
    """[B, ...] as [shards, B / shards, ...]: no row moves to another device."""
    return x.reshape(shards, x.shape[0] // shards, *x.shape[1:])


def _taken(x: jax.Array, start: jax.Array, rows: int, shards: int) -> jax.Array:
    """The rows start .. start + rows - 1 of each shard of an array."""
    part = lax.dynamic_slice_in_dim(_by_shard(x, shards), start, rows, axis=1)
    return part.reshape(shards * rows, *x.shape[1:])


def _put_back(x: jax.Array, part: jax.Array, start: jax.Array, shards: int) -> jax.Array:
    """The array with such rows in it."""
    both = _by_shard(x, shards), _by_shard(part, shards)
    return lax.dynamic_update_slice_in_dim(*both, start, axis=1).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("rows", "shards"))
def _rows_from(
    start: jax.Array, arrays: tuple[jax.Array, jax.Array], rows: int, shards: int
) -> tuple[jax.Array, jax.Array]:
    """Some rows of each array; a copy, which may be donated."""
    first, second = (_taken(x, start, rows, shards) for x in arrays)
    return first, second


def _joined(parts: list[jax.Array], batch: int, shards: int) -> jax.Array:
    """What was made of the parts, as that of the batch: of the last part, without the rows that it took twice."""
    if len(parts) == 1:
        return parts[0]
    *before, last = (_by_shard(part, shards) for part in parts)
    again = -(batch // shards) % last.shape[1]
    return jnp.concatenate([*before, last[:, again:]], axis=1).reshape(batch, *last.shape[2:])


@jax.jit
def embed(model: Model, tokens: jax.Array) -> jax.Array:
    """int32 [B, S] -> hidden [B, S, D]."""
    return model.embed(tokens)


@last_programs(static_argnames="implementation", donate_argnames=("hidden", "cache"))
def _prefill_rows(
    layer: Layer,
    hidden: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    start: jax.Array,
    *,
    implementation: Implementation,
) -> tuple[jax.Array, LayerCache]:
    """Run prompts [b, S, D] through one layer; they fill the sequences start .. start + b - 1 of its cache."""
    return _of_rows(functools.partial(layer.prefill, implementation=implementation), hidden, cache, lengths, start)


@last_programs(static_argnames="implementation", donate_argnames=("hidden", "cache"))
def _extend_rows(
    layer: TurnLayer,
    hidden: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    start: jax.Array,
    *,
    implementation: Implementation,
) -> tuple[jax.Array, LayerCache]:
    """`_prefill_rows`, but after what those sequences hold."""
    # The last part may begin with sequences that have their tokens already.
    shards = _shards(cache)
    rows = hidden.shape[0] // shards
    done = jnp.tile(jnp.arange(rows) < -start % rows, shards)
    lengths = jnp.where(done, 0, lengths)
    return _of_rows(functools.partial(layer.extend, implementation=implementation), hidden, cache, lengths, start)


def _of_rows(
    run: Callable[[jax.Array, LayerCache, jax.Array], tuple[jax.Array, LayerCache]],
    hidden: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Run a layer's method on some sequences of its cache."""
    if hidden.shape[0] == cache.batch:
        return run(hidden, cache, lengths)
    shards = _shards(cache)
    rows = hidden.shape[0] // shards
    part = jax.tree.map(lambda leaf: _taken(leaf, start, rows, shards), cache)
    hidden, part = run(hidden, part, lengths)
    return hidden, jax.tree.map(lambda leaf, new: _put_back(leaf, new, start, shards), cache, part)


@jax.jit
def _last_logits(model: Model, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.logits(jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])
