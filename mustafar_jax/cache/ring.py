"""Where a token that is not packed lies: the sinks, then a ring of whole groups of the most recent tokens.

A group that leaves the ring is contiguous, and nothing is ever shifted. Dense slots are [0, sinks) and the ring's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mustafar_jax import layout
from mustafar_jax.config import CompressionConfig


@dataclasses.dataclass(frozen=True)
class Ring:
    """The dense slots of a cache. Static.

    Attributes:
        sinks: slots of the first tokens.
        size: slots of the ring: whole groups that hold residual_length + group tokens. Where no sequence can ever be
            long enough to be packed, there is a slot for each token of the capacity.
    """

    sinks: int
    size: int

    @classmethod
    def of(cls, config: CompressionConfig, capacity: int) -> "Ring":
        """The slots of a cache of this capacity."""
        sinks = min(config.sink_tokens, capacity)
        if config.packed_tokens(capacity) == 0:
            return cls(sinks, max(1, capacity - sinks))
        return cls(sinks, -(-config.residual_length // config.group) * config.group + config.group)

    @property
    def slots(self) -> int:
        """All of them."""
        return self.sinks + self.size

    def slot(self, position: jax.Array) -> jax.Array:
        """The slot that the token at a position has, or had."""
        return layout.slot_of_position(position, self.sinks, self.size)

    def positions(self, packed: jax.Array) -> jax.Array:
        """int32 [B, slots]: the token in each slot of sequences that have `packed` [B] tokens packed.

        A sequence's length or more where there is none.
        """
        slots = jnp.arange(self.slots, dtype=jnp.int32)[None]
        return layout.position_of_slot(slots, packed[:, None], self.sinks, self.size)

    def newest(self, lengths: jax.Array) -> jax.Array:
        """int32 [B, slots]: the last token that each slot has come to hold, of sequences of these lengths; or -1."""
        last, slot = lengths[:, None] - 1, jnp.arange(self.slots)[None]
        in_ring = last - (last - slot) % self.size
        sink = jnp.where(slot <= last, slot, -1)
        return jnp.where(slot < self.sinks, sink, jnp.where(in_ring >= self.sinks, in_ring, -1))


def place_prompt(x: jax.Array, positions: jax.Array, lengths: jax.Array) -> jax.Array:
    """The tokens of prompts [B, S, K, H] at positions [B, s], as [B, K, s, H]; zero from each length [B] on."""
    tokens = jnp.take_along_axis(x, positions[:, :, None, None], axis=1, mode="clip").swapaxes(1, 2)
    return jnp.where((positions < lengths[:, None])[:, None, :, None], tokens, 0)


def place_new(slots: jax.Array, tokens: jax.Array, positions: jax.Array, lengths: jax.Array) -> jax.Array:
    """Slots [B, K, s, H] with the new ones of tokens [B, n, K, H] in them.

    Args:
        slots: see above.
        tokens: at the positions from `lengths` on.
        positions: int32 [B, s], of the token that each slot holds afterwards.
        lengths: int32 [B], before; a token is new from there on.
    """
    index = (positions - lengths[:, None])[:, None, :, None]
    new = jnp.take_along_axis(tokens.swapaxes(1, 2), index, axis=2, mode="clip")
    return jnp.where(index >= 0, new, slots)
