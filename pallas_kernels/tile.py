"""Unpacking a tile of tokens into shared memory, and reading it back as operands of matrix products.

A tile is 128 tokens of one head, one per thread. Each thread walks its token's bitmap and stores every entry in the
word of its channel, so the work is per entry held; the tile is then read as dense operands, so the product costs the
same for 1 to 16 query heads. Channels p and p + head_dim / 2 share a word; 132 words hold the tokens of one p:

    16-bit place of (token t, channel c) = 2 * (132 * (c % (H / 2)) + t) + c // (H / 2)

The stride of 132 = 4 mod 32 banks makes both readings free of bank conflicts: 8 tokens of every second p for keys, 4
tokens of 8 neighbouring p for values. Within each 8 tokens, `token_of_column` gives the order in which the operands'
columns stand for tokens.
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
COLUMNS = 32
"""Tokens (keys) or channels (values) that one operand has: each thread holds 4 of its 16 * 32 entries."""
_STRIDE = 132


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

    @property
    def pairs(self) -> int:
        """Words per token."""
        return self.head_dim // 2

    def zeros(self) -> triton.Memory:
        """An empty tile."""
        return triton.shared_zeros(self.pairs * _STRIDE, _lane(), interpret=self.interpret)

    def scatter(self, memory: triton.Memory, words: list[jax.Array], chunks: list[jax.Array]) -> triton.Memory:
        """Store a tile's entries in an empty tile.

        Args:
            memory: the empty tile.
            words: int32 [TOKENS] each, the bitmap's words; 0 for tokens that are not to be seen.
            chunks: int16 [TOKENS, chunk] each, the slots in order.
        """
        words, places = _skip_empty(words, self._places())
        for chunk in chunks:
            for entry in triton.unstack(chunk):
                lowest = words[0] & -words[0]
                channel = triton.highest_bit(lowest, interpret=self.interpret)
                place = channel * np.int32(4 * _STRIDE) + places[0]
                memory = triton.shared_store(memory, place, entry, lowest, interpret=self.interpret)
                words, places = _next_word([words[0] ^ lowest, *words[1:]], places)
        return triton.synchronise(memory, interpret=self.interpret)

    def keys(self, memory: triton.Memory) -> tuple[triton.Memory, list[list[jax.Array]]]:
        """Read a tile for `queries @ keys`, and empty it.

        Returns:
            The empty tile, and operands[column group][step], [16, COLUMNS]: row 8 i + 2 j + h of a step is channel
            8 step + 2 j + i + h * H / 2 (see `permute_query`), columns are tokens.
        """
        row, lane = _lane() >> 2, _lane() & 3
        start = lane * np.int32(8 * _STRIDE) + token_of_column(row) * 4
        groups, read = [], []
        for group in range(TOKENS // COLUMNS):
            operands = []
            for step in range(self.pairs // 8):
                offsets = [4 * ((8 * step + i) * _STRIDE + group * COLUMNS) for i in range(2)]
                pair = [triton.shared_load(memory, start, offset, interpret=self.interpret) for offset in offsets]
                operands.append(_operand([pair], self.dtype))
                read += pair
            groups.append(operands)
        return triton.synchronise(memory, read, interpret=self.interpret), groups

    def values(self, memory: triton.Memory) -> tuple[triton.Memory, list[list[jax.Array]]]:
        """Read a tile for `probabilities @ values`, and empty it.

        Returns:
            The empty tile, and operands[channel group][step], [32, COLUMNS]: rows are the tokens of column group
            `step` in the order of the scores' columns; columns are channels COLUMNS * (channel group) onwards.
        """
        row, lane = _lane() >> 2, _lane() & 3
        start = row * np.int32(4 * _STRIDE) + lane * 4
        groups: list[list[jax.Array]] = [[] for _ in range(self.head_dim // COLUMNS)]
        read = []
        for pair_group in range(self.pairs // COLUMNS):
            for step in range(TOKENS // 32):
                halves: list[list[list[jax.Array]]] = [[], []]
                for part in range(2):  # 16 tokens each
                    words = []
                    for i in range(2):
                        for h in range(2):
                            token = 32 * step + 16 * part + 8 * i + 4 * h
                            offset = 4 * (pair_group * COLUMNS * _STRIDE + token)
                            words.append(triton.shared_load(memory, start, offset, interpret=self.interpret))
                    read += words
                    for half in range(2):
                        pick = [triton.pick_halves(*words[2 * i : 2 * i + 2], half, interpret=self.interpret) for i in range(2)]
                        halves[half].append(pick)
                for half in range(2):
                    groups[half * (self.pairs // COLUMNS) + pair_group].append(_operand(halves[half], self.dtype))
        return triton.synchronise(memory, read, interpret=self.interpret), groups

    def _places(self) -> list[jax.Array]:
        """Byte offset of each bitmap word's channel 0, in this thread's token."""
        token = _lane() * 4
        per_half = self.pairs // 32
        return [token + np.int32(4 * _STRIDE * 32 * (j % per_half) + 2 * (j // per_half)) for j in range(2 * per_half)]


def permute_query(query: jax.Array) -> jax.Array:
    """Put a query's channels [..., H] into the order of the key operands' rows."""
    *leading, head_dim = query.shape
    parts = query.reshape(*leading, 2, head_dim // 16, 4, 2)  # half h, step, j, i
    order = (*range(len(leading)), *(len(leading) + axis for axis in (1, 3, 2, 0)))
    return parts.transpose(order).reshape(query.shape)


def token_of_column(column: jax.Array) -> jax.Array:
    """The token of a tile that a column of the scores stands for: within each 8, 0 4 1 5 2 6 3 7."""
    return (column & ~7) | ((column >> 1) & 3) | ((column & 1) << 2)


def _lane() -> jax.Array:
    return jnp.arange(TOKENS, dtype=jnp.int32)


def _operand(steps: list[list[jax.Array]], dtype: Any) -> jax.Array:
    """The [16 or 32, COLUMNS] operand whose words each thread has read: words [step of 16][i], each [4 * COLUMNS].

    Thread (column, j) holds rows 16 step + 8 i + 2 j + h; the compiler gives the product's operand the same threads,
    so no data moves.
    """
    words = [[triton.as_dtype_pairs(word, dtype) for word in step] for step in steps]
    # stack joins along a new last axis: h last, after it the step
    per_step = [
        jnp.stack([jnp.stack([low0, low1], axis=-1), jnp.stack([high0, high1], axis=-1)], axis=-1)
        for (low0, high0), (low1, high1) in words
    ]  # [4 * COLUMNS, i, h]
    if len(per_step) == 1:
        return per_step[0].reshape(COLUMNS, 4, 2, 2).transpose(2, 1, 3, 0).reshape(16, COLUMNS)
    both = jnp.stack(per_step, axis=-1).reshape(COLUMNS, 4, 2, 2, 2)  # column, j, i, h, step
    return both.transpose(4, 2, 1, 3, 0).reshape(32, COLUMNS)


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
