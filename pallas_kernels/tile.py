"""Unpacking a tile of tokens into shared memory, and reading it back as operands of matrix products.

A tile is 128 tokens of one head, one per thread. Each thread walks its token's bitmap and stores every entry at the
place of its channel, so the work is per entry held; the tile is then read as dense operands, so the product costs the
same for 1 to 16 query heads. A word holds two neighbouring tokens of one channel; 68 words hold a channel's tokens:

    byte of (token t, channel c) = 2 * t + 4 * 68 * c

The stride of 68 = 4 mod 32 banks makes both readings free of bank conflicts: for keys 8 token pairs of every second
channel, for values 4 token pairs of 8 neighbouring channels. Stores meet in a bank about three at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mustafar_jax.pallas_kernels import triton

TOKENS = 128
"""Tokens of a tile; threads of a block."""
NUM_WARPS = TOKENS // triton.WARP
HALF = TOKENS // 2
COLUMNS = 32
"""Columns of an operand of 16 rows of which each thread holds 4 entries."""
_STRIDE = 68 * 4
"""Bytes from one channel to the next."""


@dataclasses.dataclass(frozen=True)
class TileReader:
    """How tiles of one head_dim and dtype are unpacked and read. Static.

    Attributes:
        head_dim: 64 or 128.
        dtype: bfloat16 or float16.
        interpret: use the helpers' plain JAX twins.
    """

    head_dim: int
    dtype: Any
    interpret: bool = False

    def zeros(self) -> triton.Memory:
        """An empty tile."""
        return triton.shared_zeros(self.head_dim * _STRIDE // 4, _lane(), interpret=self.interpret)

    def scatter(self, memory: triton.Memory, words: list[jax.Array], chunks: list[jax.Array]) -> triton.Memory:
        """Store a tile's entries in an empty tile.

        Args:
            memory: the empty tile.
            words: int32 [TOKENS] each, the bitmap's words; 0 for tokens that are not to be seen.
            chunks: int16 [TOKENS, chunk] each, the slots in order.
        """
        start = triton.shared_offset(memory, 2 * _lane(), interpret=self.interpret)
        words, places = _skip_empty(words, [start + np.int32(_STRIDE * 32 * j) for j in range(len(words))])
        for chunk in chunks:
            for entry in triton.unstack(chunk):
                lowest = words[0] & -words[0]
                channel = triton.highest_bit(lowest, interpret=self.interpret)
                place = channel * np.int32(_STRIDE) + places[0]
                memory = triton.shared_store(memory, place, entry, lowest, interpret=self.interpret)
                words, places = _next_word([words[0] ^ lowest, *words[1:]], places)
        return triton.synchronise(memory, interpret=self.interpret)

    def times_keys(self, memory: triton.Memory, query: jax.Array) -> tuple[triton.Memory, jax.Array]:
        """Multiply queries [16, H] with a tile of keys, and empty it.

        Returns:
            The empty tile, and float32 scores [16, TOKENS].
        """
        row, lane = _lane() >> 2, _lane() & 3
        start = triton.shared_offset(memory, lane * np.int32(2 * _STRIDE) + row * 4, interpret=self.interpret)
        halves, read = [], []
        for half in range(2):
            steps: list[list[list[jax.Array]]] = [[], []]  # [even or odd tokens][step][i]
            for step in range(self.head_dim // 16):
                words = []
                for i, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    offset = (16 * step + 8 * i + h) * _STRIDE + 2 * HALF * half
                    words.append(triton.shared_load(memory, start, offset, interpret=self.interpret))
                read += words
                for parity in range(2):
                    pairs = (words[:2], words[2:])
                    steps[parity].append([triton.pick_halves(*w, parity, interpret=self.interpret) for w in pairs])
            scores = [triton.dot(query, _operand(of_parity, self.dtype)) for of_parity in steps]
            halves.append(jnp.stack(scores, axis=-1).reshape(query.shape[0], HALF))
        return triton.synchronise(memory, read, interpret=self.interpret), join_halves(*halves)

    def times_values(
        self, memory: triton.Memory, weights: jax.Array, out: list[jax.Array]
    ) -> tuple[triton.Memory, list[jax.Array]]:
        """Add the product of weights [16, TOKENS] with a tile of values to `out`, and empty the tile.

        Args:
            memory: the tile.
            weights: of the tile's dtype.
            out: float32 [16, COLUMNS] for each COLUMNS channels.
        """
        row, lane = _lane() >> 2, _lane() & 3
        start = triton.shared_offset(memory, row * np.int32(_STRIDE) + lane * 4, interpret=self.interpret)
        sums, read = [], []
        for group in range(self.head_dim // COLUMNS):
            steps = []
            for step in range(TOKENS // 16):
                offsets = [_STRIDE * COLUMNS * group + 2 * (16 * step + 8 * i) for i in range(2)]
                words = [triton.shared_load(memory, start, o, interpret=self.interpret) for o in offsets]
                read += words
                steps.append([triton.copy(word, interpret=self.interpret) for word in words])
            sums.append(out[group] + triton.dot(weights, _operand(steps, self.dtype)))
        return triton.synchronise(memory, read, interpret=self.interpret), sums


def join_halves(first: jax.Array, second: jax.Array) -> jax.Array:
    """[16, HALF] and [16, HALF] -> [16, TOKENS]."""
    return jnp.stack([first, second], axis=-1).transpose(0, 2, 1).reshape(first.shape[0], TOKENS)


def _lane() -> jax.Array:
    return jnp.arange(TOKENS, dtype=jnp.int32)


def _operand(steps: list[list[jax.Array]], dtype: Any) -> jax.Array:
    """The [16 * steps, COLUMNS] operand whose words each thread has read: steps[step][i], each [4 * COLUMNS].

    Thread (column, j) holds rows 16 step + 8 i + 2 j + h, h in a word's halves; the compiler gives the product's
    operand the same threads, so no data moves.
    """
    parts = [triton.as_dtype_pairs(word, dtype) for step in steps for word in step]  # [step, i][h]
    stacked = _stack([half for part in parts for half in part])  # [4 * COLUMNS, 2, ..., 2]: bits of step, then i, h
    count = len(steps)
    stacked = stacked.reshape(COLUMNS, 4, *stacked.shape[1:])
    *step_bits, i, h = range(2, stacked.ndim)
    return stacked.transpose(*step_bits, i, 1, h, 0).reshape(16 * count, COLUMNS)


def _stack(parts: list[jax.Array]) -> jax.Array:
    """Stack 2 ** n arrays along n new last axes, the first of them the highest bit; pairs are what can be stacked."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack([_stack(parts[0::2]), _stack(parts[1::2])], axis=-1)


def _skip_empty(words: list[jax.Array], places: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Move empty words behind the others, each with its place."""
    words, places = list(words), list(places)
    for first in reversed(range(len(words) - 1)):
        words[first:], places[first:] = _next_word(words[first:], places[first:])
    return words, places


def _next_word(words: list[jax.Array], places: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Where the first word is used up, move the others one place ahead."""
    done = words[0] == 0
    words = [jnp.where(done, ahead, word) for word, ahead in zip(words, [*words[1:], jnp.zeros_like(done, jnp.int32)], strict=True)]
    places = [jnp.where(done, ahead, place) for place, ahead in zip(places, [*places[1:], places[-1]], strict=True)]
    return words, places
