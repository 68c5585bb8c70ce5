"""Tokens that leave the dense part of a cache, and what a backend is asked to do with them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.cache.statistics import attention_received, query_positions
from mustafar_jax.config import CompressionConfig
from mustafar_jax.operands import Mean, Packing, Side
from mustafar_jax.pruning import Context
from mustafar_jax.rows import Rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "first", "start", "held", "all_keys"],
    meta_fields=["rows", "head_axis", "bounded"],
)
@dataclasses.dataclass(frozen=True)
class Leaving:
    """Consecutive tokens of each sequence. A pytree.

    Attributes:
        key, value: what they are taken from, [B, S, K, H] or [B, K, S, H].
        first, start, held, rows, head_axis, bounded: as in `Packing`.
        all_keys: [B, S, K, H] from position 0 on, where a rule scores with the attention that tokens receive and they
            are not those of a prompt, or of a cache.
    """

    key: jax.Array
    value: jax.Array
    first: jax.Array
    start: jax.Array
    held: jax.Array
    rows: int
    head_axis: int
    bounded: bool = True
    all_keys: jax.Array | None = None


def packing_of(
    leaving: Leaving,
    config: CompressionConfig,
    targets: tuple[Rows, Rows],
    mean: Mean | None,
    weight: jax.Array | None,
    context: Callable[[jax.Array, jax.Array], Context],
) -> Packing:
    """The packing of tokens into the rows of keys and of values, by a config's rules.

    Args:
        leaving: the tokens.
        config: of the cache.
        targets: of keys, of values.
        mean, weight: of keys; see `Side`.
        context: see `Packing`.
    """
    keys, values = config.formats(targets[0].head_dim, np.dtype(leaving.key.dtype))
    k_sparsity, v_sparsity = config.removed(targets[0].head_dim)
    return Packing(
        key=Side(
            leaving.key,
            targets[0],
            keys,
            config.k_method,
            config.key_method,
            k_sparsity,
            mean,
            weight,
            turn=config.rotate_keys,
        ),
        value=Side(
            leaving.value,
            targets[1],
            values,
            config.v_method,
            config.value_method,
            v_sparsity,
            rescale=config.rescale_values,
            turn=config.rotate_values,
        ),
        first=leaving.first,
        start=leaving.start,
        held=leaving.held,
        rows=leaving.rows,
        head_axis=leaving.head_axis,
        offset=config.sink_tokens,
        context=context,
        bounded=leaving.bounded,
    )


def rule_context(
    positions: jax.Array,
    valid: jax.Array,
    *,
    queries: jax.Array | None,
    lengths: jax.Array,
    num_kv_heads: int,
    all_keys: Callable[[], jax.Array] | None,
) -> Context:
    """What rules see besides the entries.

    Args:
        positions: int32 [B, n], of the tokens.
        valid: bool [B, n], which of them there are.
        queries: [B, N, 32, H], the most recent ones; None where no rule needs them.
        lengths: int32 [B], of the sequences.
        num_kv_heads: K.
        all_keys: gives the keys [B, S, K, H]; None where no rule scores with attention.
    """
    if queries is None:
        return Context(valid)
    by_kv_head = queries.astype(jnp.float32).reshape(queries.shape[0], num_kv_heads, -1, queries.shape[-1])
    if all_keys is None:
        return Context(valid, by_kv_head)
    # A query that is zero everywhere went when a sequence was cut.
    position = jnp.where((queries != 0).any(axis=(1, 3)), query_positions(lengths), -1)
    attention = attention_received(by_kv_head, position, all_keys())
    return Context(valid, by_kv_head, jnp.take_along_axis(attention, positions[:, None], axis=2))
