"""Unpacking a tile of tokens into shared memory, and reading it back as operands of matrix products.

A tile is 128 tokens of one head, one per thread. Each thread walks its token's bitmap and stores every entry at the
place of its channel, so the work is per entry held; the tile is then read as dense operands, so the product costs the
same for 1 to 16 query heads. A word holds the channels c and c + H / 2 of one token, the pair that RoPE turns; 132
words hold a pair's tokens:

    byte of (token t, channel c) = 4 * t + 4 * 132 * (c % (H / 2)) + 2 * (c // (H / 2))

The stride of 132 = 4 mod 32 banks makes both readings free of bank conflicts: for keys the tokens 0 .. 3 and 16 .. 19
of 4 neighbouring pairs, for values 4 neighbouring tokens of 8 neighbouring pairs. Stores meet in a bank about three at
a time.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mustafar_jax.pallas_kernels.triton import language as tl

TOKENS = 128
"""Tokens of a tile; threads of a block."""
NUM_WARPS = TOKENS // tl.WARP
HALF = TOKENS // 2
ROWS = 16
"""Rows of a matrix product, the fewest that there are; query heads are padded to a multiple."""
COLUMNS = 32
"""Columns of an operand of 16 rows of which each thread holds 4 entries."""
_STRIDE = 132 * 4
"""Bytes from one pair of channels to the next."""
Inner = Literal["tokens", "columns"]


class Order(NamedTuple):
    """Which tokens of a tile the four products of its keys take, COLUMNS each.

    Attributes:
        products: the first token of each.
        token: of a product's column, how far it is from that.
    """

    products: tuple[int, int, int, int]
    token: Callable[[Any], Any]


ENTRIES = Order((0, 4, HALF, HALF + 4), lambda column: token_of_column(2 * column))
"""Of keys that a tile was unpacked of: by a column's parity in either half."""


class Entries(NamedTuple):
    """A tile of packed rows on its way from memory.

    Attributes:
        words: the bitmap's words, int32 [TOKENS] each; 0 for tokens that are not to be seen.
        ahead: the first chunks of slots, int32 [TOKENS, chunk / 2] each, two slots to a word.
        load: the chunk of an index.
        chunks: how many there are.
    """

    words: list[jax.Array]
    ahead: list[jax.Array]
    load: Callable[[Any], jax.Array]
    chunks: int


@dataclasses.dataclass(frozen=True)
class Rotations:
    """Which rows of an operand hold the product of queries and a mean, rotated to several tokens of a tile. Static.

    Up to 8 query heads leave the operand's last 8 rows free. These hold the product for all heads, rotated to as many
    tokens as there is room for, so that one table serves them all and one operand the keys and the table. More heads
    take an operand of their own.

    Attributes:
        count: 1, 2 or 4.
        rows: the last rows of the operand that hold them, 8 or 16.
        order: of the keys' products.
    """

    count: int
    rows: int
    order: Order = ENTRIES

    @classmethod
    def of(cls, group: int, order: Order = ENTRIES) -> "Rotations":
        """Those of so many query heads, 1 to 16."""
        return cls(4 if group <= 2 else 2 if group <= 4 else 1, 8 if group <= 8 else ROWS, order)

    @property
    def tokens(self) -> np.ndarray:
        """How many tokens each is ahead of the table: int32 [count]."""
        return np.array(self.order.products[:: len(self.order.products) // self.count], np.int32)

    def place(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and rotation of each of the operand's rows; those before the last `rows` are not used."""
        heads = self.rows // self.count
        return row % heads, row % self.rows // heads

    def of_rows(self, x: jax.Array) -> list[jax.Array]:
        """Of [ROWS, COLUMNS] each rotation's rows, in the first rows of ROWS; anything of x behind them."""
        parts, heads = ROWS // self.rows, self.rows // self.count
        last = pick(x.reshape(parts, self.rows, COLUMNS), parts - 1)  # the first rotation's rows are its first ones
        each = last.reshape(self.count, heads, COLUMNS)
        return [_repeat(part) for part in (last, *(pick(each, i) for i in range(1, self.count)))]


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
        """Pairs of channels."""
        return self.head_dim // 2

    def zeros(self) -> tl.Memory:
        """An empty tile."""
        return tl.shared_zeros(self.pairs * _STRIDE // 4, _lane(), interpret=self.interpret)

    def scatter(self, memory: tl.Memory, entries: Entries) -> tl.Memory:
        """Store a tile's entries over what it holds."""
        start = tl.shared_offset(memory, 4 * _lane(), interpret=self.interpret)
        starts = [32 * word % self.pairs * _STRIDE + 32 * word // self.pairs * 2 for word in range(len(entries.words))]
        words, places = _skip_empty(entries.words, [start + np.int32(offset) for offset in starts])

        def walk(i: jax.Array, carry: tuple) -> tuple:  # type: ignore[type-arg]
            memory, words, places, (chunk, *ahead) = carry
            # in flight while the chunks before it are stored
            ahead.append(entries.load(jnp.minimum(i + len(entries.ahead), entries.chunks - 1)))
            for pair, half in itertools.product(tl.unstack(chunk), range(2)):
                lowest = words[0] & -words[0]
                channel = tl.highest_bit(lowest, interpret=self.interpret)
                place = channel * np.int32(_STRIDE) + places[0]
                memory = tl.shared_store_half(memory, place, pair, half, lowest, interpret=self.interpret)
                words, places = _next_word([words[0] ^ lowest, *words[1:]], places)
            return memory, words, places, ahead

        memory, *_ = lax.fori_loop(0, entries.chunks, walk, (memory, words, places, entries.ahead))
        return tl.synchronise(memory, interpret=self.interpret)

    def times_keys(self, memory: tl.Memory, query: jax.Array, scores: list[jax.Array]) -> tuple[tl.Memory, jax.Array]:
        """Add the product of queries with a tile of keys to `scores`, and empty the tile.

        Args:
            memory: the tile.
            query: [ROWS, H], its columns in the order of `channel_of_row`.
            scores: float32 [ROWS, COLUMNS] for each of the products, as `times_table` returns them.

        Returns:
            The empty tile, and float32 scores [ROWS, TOKENS], column c for the token `token_of_column(c)`.
        """
        column, lane = _lane() >> 2, _lane() & 3
        place = lane * np.int32(_STRIDE) + 4 * token_of_column(2 * column)
        start = tl.shared_offset(memory, place, interpret=self.interpret)
        sums, read = [], []
        for first, score in zip(ENTRIES.products, scores, strict=True):
            offsets = [4 * i * _STRIDE + 4 * first for i in range(self.pairs // 4)]
            words = [tl.shared_load(memory, start, offset, interpret=self.interpret) for offset in offsets]
            sums.append(score + tl.dot(query, self._keys(words)))
            read += words
        halves = [jnp.stack(sums[i : i + 2], axis=-1).reshape(query.shape[0], HALF) for i in (0, 2)]
        return tl.synchronise(memory, read, interpret=self.interpret), join_halves(*halves)

    def no_scores(self) -> list[jax.Array]:
        """Zeros for `times_keys` to add to."""
        return [jnp.zeros((ROWS, COLUMNS), jnp.float32) for _ in ENTRIES.products]

    def times_table(self, query: jax.Array, ref: tl.Ref, index: jax.Array, rotations: Rotations) -> list[jax.Array]:
        """Multiply with a tile of a table in global memory, which is dense and the same for all heads.

        Args:
            query: what multiplies the table, [ROWS, H] of the tile's dtype, in rows as `rotations` has them.
            ref: the table's words, int32 [tiles * H / 2 * TOKENS / count], each tile in the order of `table_order`.
            index: which tile.
            rotations: of what multiplies the table.

        Returns:
            Scores as `times_keys` adds to them; their rows are a rotation's, anything finite behind them.
        """
        chunks, products = self.head_dim // 32, len(rotations.order.products) // rotations.count
        start = 4 * (index * (products * chunks * TOKENS) + _lane())[:, None]
        place = start + jnp.arange(4, dtype=jnp.int32)[None, :]
        scores = []
        for product in range(products):
            words = []
            for chunk in range(product * chunks, (product + 1) * chunks):
                # kept in the first-level cache, since the blocks of a multiprocessor read the same
                loaded = tl.load(ref.at[place + 4 * TOKENS * chunk], eviction_policy="evict_last")
                words += tl.unstack(loaded)
            scores.append(rotations.of_rows(tl.dot(query, self._keys(words))))
        return [rotated[i] for i in range(rotations.count) for rotated in scores]

    def table_order(self, rotations: Rotations) -> tuple[np.ndarray, np.ndarray]:
        """Row, below H, and token of each entry of a table's tile, int32 [H * TOKENS / count] each.

        A thread reads eight entries at once, all that it holds of 32 rows of a product, and a warp a run of them.
        """
        order = rotations.order
        products = np.array(order.products[: len(order.products) // rotations.count], np.int32)
        shape = (len(products), self.head_dim // 32, TOKENS, 2, 2, 2)
        product, chunk, thread, step, i, h = np.indices(shape, np.int32).reshape(len(shape), -1)
        row = 32 * chunk + 16 * step + 8 * i + 2 * (thread & 3) + h
        return row, products[product] + order.token(thread >> 2)

    def _keys(self, words: list[jax.Array]) -> jax.Array:
        """The operand of a product of keys, [8 * len(words), COLUMNS]."""
        return _operand([words[i : i + 2] for i in range(0, len(words), 2)], self.dtype, "tokens")

    def times_values(
        self, memory: tl.Memory, weights: jax.Array, out: list[jax.Array], *, order: Inner
    ) -> tuple[tl.Memory, list[jax.Array]]:
        """Add the product of weights [ROWS, TOKENS] with a tile of values to `out`.

        Args:
            memory: the tile.
            weights: of the tile's dtype; column c for the token `token_of_column(c, order)`.
            out: float32 [ROWS, COLUMNS] for each COLUMNS channels.
            order: how the compiler lays out the operand that multiplies the weights: "columns" where they come out of
                another product, else "tokens".
        """
        column, lane = _lane() >> 2, _lane() & 3
        start = tl.shared_offset(memory, column * np.int32(_STRIDE) + lane * 4, interpret=self.interpret)
        groups = self.pairs // COLUMNS
        sums, read = list(out), []
        for group in range(groups):
            steps: list[list[list[jax.Array]]] = [[], []]  # [low or high half: c or c + H / 2][step][i]
            for step in range(TOKENS // 16):
                words = []
                for i, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    token = 32 * (step // 2) + 16 * i + 8 * (step % 2) + 4 * h
                    offset = _STRIDE * COLUMNS * group + 4 * token
                    words.append(tl.shared_load(memory, start, offset, interpret=self.interpret))
                read += words
                for half in range(2):
                    pairs = ((words[0], words[1]), (words[2], words[3]))
                    steps[half].append([tl.pick_halves(*pair, half, interpret=self.interpret) for pair in pairs])
            for half, of_half in enumerate(steps):
                place = half * groups + group
                sums[place] = out[place] + tl.dot(weights, _operand(of_half, self.dtype, order))
        return tl.synchronise(memory, read, interpret=self.interpret), sums


def rotate_pair(x: jax.Array, y: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RoPE's rotation of channels c and c + H / 2."""
    return x * cos - y * sin, y * cos + x * sin


def join_halves(first: jax.Array, second: jax.Array) -> jax.Array:
    """[ROWS, HALF] and [ROWS, HALF] -> [ROWS, TOKENS]."""
    return jnp.stack([first, second], axis=-1).transpose(0, 2, 1).reshape(first.shape[0], TOKENS)


def channel_of_row(row: jax.Array, head_dim: int) -> jax.Array:
    """The channel that a row of the keys' operand holds: the two of a pair are neighbours."""
    return (row >> 1) + (row & 1) * (head_dim // 2)


def token_of_column(column: Any, order: Inner = "columns") -> Any:
    """The token of a tile that a column of the scores, or of the weights, stands for.

    Within 32, of a column's bits h i j j k, lowest first (order "tokens": h j j i k), the token has j j h k i: what a
    warp reads at once lies in banks of its own.
    """
    h, k = column & 1, column >> 4 & 1
    j, i = (column >> 2 & 3, column >> 1 & 1) if order == "columns" else (column >> 1 & 3, column >> 3 & 1)
    return (column & ~31) | j | (h << 2) | (k << 3) | (i << 4)


def pick(x: jax.Array, index: int) -> jax.Array:
    """x[index] of three axes.

    By a sum with zeros: the compiler exchanges registers of a warp for it, where slices go through shared memory.
    """
    if x.shape[0] == 1:
        return x.reshape(x.shape[1:])
    place = jnp.arange(x.shape[0])[:, None, None]
    return jnp.where(place == index, x, 0).sum(axis=0)


def _repeat(x: jax.Array) -> jax.Array:
    """[n, COLUMNS] -> [ROWS, COLUMNS]."""
    return jnp.broadcast_to(x[None], (ROWS // x.shape[0], *x.shape)).reshape(ROWS, COLUMNS)


def _lane() -> jax.Array:
    return jnp.arange(TOKENS, dtype=jnp.int32)


def _operand(steps: list[list[jax.Array]], dtype: Any, order: Inner) -> jax.Array:
    """The [16 * steps, COLUMNS] operand whose words each thread has read: steps[step][i], each [4 * COLUMNS].

    Thread (column, j) holds rows 16 step + 8 i + 2 j + h, h in a word's halves, or 16 step + 4 j + 2 i + h in the order
    "columns". These are the two layouts that the compiler gives a product's operands (2 and 4 neighbouring rows per
    thread), so no data moves. It takes the second where the other operand comes from a product of such operands.
    """
    parts = [tl.as_dtype_pairs(word, dtype) for step in steps for word in step]  # [step, i][h]
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
