"""Unpacking a tile of tokens into shared memory, and reading it back as operands of matrix products.

A tile is 128 tokens of one head, one per thread. Each thread walks its token's bitmap and stores every entry at the
place of its channel, so the work is per entry held; the tile is then read as dense operands, so the product costs the
same for 1 to 16 query heads. A word holds two neighbouring tokens of one channel; 68 words hold a channel's tokens:

    byte of (token t, channel c) = 2 * t + 4 * 68 * c

The stride of 68 = 4 mod 32 banks makes both readings free of bank conflicts: for keys 8 token pairs of every second
channel, for values 4 token pairs of 8 neighbouring channels. Stores meet in a bank about three at a time.
"""

import dataclasses
from typing import Any, Literal

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


Order = Literal["tokens", "columns"]


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
            The empty tile, and float32 scores [16, TOKENS], column c for the token `token_of_column(c)`.
        """
        row, lane = _lane() >> 2, _lane() & 3
        place = lane * np.int32(2 * _STRIDE) + 2 * token_of_column(2 * row)
        start = triton.shared_offset(memory, place, interpret=self.interpret)
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
                    pairs = ((words[0], words[1]), (words[2], words[3]))
                    picked = [triton.pick_halves(a, b, parity, interpret=self.interpret) for a, b in pairs]
                    steps[parity].append(picked)
            scores = [triton.dot(query, _operand(of_parity, self.dtype, "tokens")) for of_parity in steps]
            halves.append(jnp.stack(scores, axis=-1).reshape(query.shape[0], HALF))
        return triton.synchronise(memory, read, interpret=self.interpret), join_halves(*halves)

    def times_values(
        self, memory: triton.Memory, weights: jax.Array, out: list[jax.Array], *, order: Order
    ) -> tuple[triton.Memory, list[jax.Array]]:
        """Add the product of weights [16, TOKENS] with a tile of values to `out`, and empty the tile.

        Args:
            memory: the tile.
            weights: of the tile's dtype, a column for each token.
            order: how the columns stand for the tokens: as the tokens do, or as `token_of_column` says.
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
                steps.append(words)
            sums.append(out[group] + triton.dot(weights, _operand(steps, self.dtype, order)))
        return triton.synchronise(memory, read, interpret=self.interpret), sums


def join_halves(first: jax.Array, second: jax.Array) -> jax.Array:
    """[16, HALF] and [16, HALF] -> [16, TOKENS]."""
    return jnp.stack([first, second], axis=-1).transpose(0, 2, 1).reshape(first.shape[0], TOKENS)


def token_of_column(column: jax.Array) -> jax.Array:
    """The token of a tile that a column of the scores stands for: pairs of tokens within each 16 in another order.

    Of a column's bits h, i and j (two of them) within 16, lowest first h i j, the token has h j i.
    """
    return (column & ~15) | (column & 1) | ((column >> 1 & 1) << 3) | ((column >> 2 & 3) << 1)


def _lane() -> jax.Array:
    return jnp.arange(TOKENS, dtype=jnp.int32)


def _operand(steps: list[list[jax.Array]], dtype: Any, order: Order) -> jax.Array:
    """The [16 * steps, COLUMNS] operand whose words each thread has read: steps[step][i], each [4 * COLUMNS].

    Thread (column, j) holds rows 16 step + 8 i + 2 j + h, h in a word's halves, or 16 step + 4 j + 2 i + h in the order
    "columns". These are the two layouts that the compiler gives a product's operands (2 and 4 neighbouring rows per
    thread), so no data moves. It takes the second where the other operand comes from a product of such operands.
    """
    parts = [triton.as_dtype_pairs(word, dtype) for step in steps for word in step]  # [step, i][h]
    stacked = _stack([half for part in parts for half in part])  # [4 * COLUMNS, 2, ..., 2]: bits of step, then i, h
    count = len(steps)
    stacked = stacked.reshape(COLUMNS, 4, *stacked.shape[1:])
    *step_bits, i, h = range(2, stacked.ndim)
    rows = (i, 1, h) if order == "tokens" else (1, i, h)
    return stacked.transpose(*step_bits, *rows, 0).reshape(16 * count, COLUMNS)


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

    def shift(values: list[jax.Array], last: jax.Array) -> list[jax.Array]:
        return [jnp.where(done, ahead, here) for here, ahead in zip(values, [*values[1:], last], strict=True)]

    return shift(words, jnp.zeros_like(words[0])), shift(places, places[-1])
