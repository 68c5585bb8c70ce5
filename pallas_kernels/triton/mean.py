"""The scores of queries with the mean of centred keys: a product with a table that all heads share."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.triton import language as tl
from mustafar_jax.pallas_kernels.triton.tile import ROWS, TOKENS, Rotations, TileReader, rotate_pair

_UNIT = 64
"""What an entry of `Centre.query` counts in: float16 ends at 65504, products of queries and means may not."""


@dataclasses.dataclass(frozen=True)
class Centre:
    """How the mean of centred keys is multiplied. Static.

    Attributes:
        reader: of the table's tiles.
        rotations: where the mean's rotations stand in an operand.
        group: query heads.
        tiles_per_split: tiles of a split.
    """

    reader: TileReader
    rotations: Rotations
    group: int
    tiles_per_split: int

    def tables(self, mean: Mean, splits: int) -> tuple[np.ndarray, np.ndarray]:
        """Turns to where each rotation of a split starts, and from there to each of a table's tokens.

        They are constants, and the same for every layer of a model, whose compiler keeps one.

        Returns:
            Float32 cosines and sines [splits * rotations * H], H / 2 of each for a rotation; words for
            `TileReader.times_table`, of H rows, a pair's cosine and its sine after each other, times _UNIT.
        """
        starts = np.arange(splits)[:, None] * (self.tiles_per_split * TOKENS) + self.rotations.tokens[None]
        angle = mean.angles(mean.bases(starts))
        of_rotation = np.stack([np.cos(angle), np.sin(angle)], axis=2)
        row, token = self.reader.table_order(self.rotations)
        pair = row >> 1
        in_tile = mean.places(token)[np.arange(token.size), pair]
        tokens = np.arange(self.tiles_per_split)[:, None] * TOKENS + in_tile[None]
        angle = tokens.astype(np.float32) * mean.inv_freq[pair][None]
        of_token = _UNIT * np.where(row[None] & 1, np.sin(angle), np.cos(angle))
        words = of_token.astype(self.reader.dtype).reshape(-1).view(np.int32)
        return of_rotation.reshape(-1), words

    def query(
        self,
        q_ref: tl.Ref,
        mean_ref: tl.Ref,
        turns_ref: tl.Ref,
        place_of: Callable[[jax.Array], jax.Array] = lambda index: index,
    ) -> jax.Array:
        """What multiplies the table for the mean's scores, float32 [ROWS, H], in rows as `Rotations` has them.

        With pairs of channels as complex numbers, the score of a query q with a mean m, rotated to some token and then
        by t tokens, is the real part of conj(q) m exp(i w t), summed over pairs, whose frequencies are w. Each rotation
        is to another token: one table serves them all.

        Args:
            q_ref: [G, H].
            mean_ref: [H].
            turns_ref: the first of `tables`.
            place_of: which of the table's rows a column of the result multiplies.
        """
        pairs = self.reader.pairs
        row, column = jnp.arange(ROWS)[:, None], place_of(jnp.arange(2 * pairs))[None, :]
        pair = column >> 1
        head, rotation = self.rotations.place(row)
        turns = (pl.program_id(0) * self.rotations.count + rotation) * (2 * pairs)
        mask = jnp.broadcast_to(head < self.group, (ROWS, 2 * pairs))
        x, y = (tl.load(q_ref.at[head, pair + half], mask=mask, other=0).astype(jnp.float32) for half in (0, pairs))
        mean = (tl.load(mean_ref.at[pair + half]) / _UNIT for half in (0, pairs))
        turn = (tl.load(turns_ref.at[turns + pair + half]) for half in (0, pairs))
        real, imaginary = rotate_pair(*rotate_pair(*mean, *turn), x, -y)
        return jnp.where(column & 1, -imaginary, real)
