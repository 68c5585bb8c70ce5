"""The instructions that the Mosaic GPU kernels are written in, for one warp of 32 lanes.

A kernel is a function of a `Warp`: `ptx.Warp` emits PTX, `simt.Warp` computes on numpy arrays, anywhere. Values are
registers: one number per lane, uint32 unless said; `+ - * // % & | ^ << >> == < >` work on them and on Python numbers,
and give predicates where they compare. All lanes run every instruction; loops and branches take conditions that are
equal in all lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

LANES = 32

Register = Any
"""A value in each of a warp's lanes."""


class Warp(Protocol):
    """One warp. A `ref` is an array in global memory, or where a row of it begins."""

    # Numbers and where we are

    def integer(self, x: int) -> Register:
        """A uint32 in every lane."""

    def number(self, x: float) -> Register:
        """A float32 in every lane."""

    def lane(self) -> Register:
        """This lane's number in the warp, 0 to 31."""

    def warp(self) -> Register:
        """This warp's number in the block."""

    def block(self) -> Register:
        """This block's number in a grid of one dimension."""

    # Arithmetic

    def select(self, where: Register, a: Register, b: Register) -> Register:
        """A in the lanes where a predicate holds, b elsewhere."""

    def maximum(self, a: Register, b: Register) -> Register:
        """The larger float32; the other one where one is NaN."""

    def exp2(self, x: Register) -> Register:
        """2 ** x in float32, subnormal results flushed to 0; relative error 2 ** -22."""

    def log2(self, x: Register) -> Register:
        """The logarithm of a float32 to base 2, subnormal numbers taken as 0; absolute error 2 ** -22 near 1."""

    def reciprocal(self, x: Register) -> Register:
        """1 / x in float32, subnormal numbers taken as 0; relative error 2 ** -23."""

    def fused(self, a: Register, b: Register, c: Register) -> Register:
        """The float32 a * b + c, rounded once; a product and a sum written as such are not fused."""

    def as_float(self, x: Register) -> Register:
        """The bits of a uint32 as a float32."""

    def as_bits(self, x: Register) -> Register:
        """The bits of a float32 as a uint32."""

    def pack_pair(self, low: Register, high: Register, *, float16: bool = False) -> Register:
        """Two float32, rounded to the dtype, or to float16 whatever that is, in the halves of a word."""

    def unpack_pair(self, x: Register, *, float16: bool = False) -> list[Register]:
        """The inverse of `pack_pair`: two float32."""

    def pick_halves(self, a: Register, b: Register, half: int) -> Register:
        """Half `half` (0 low, 1 high) of a in the low half, the same half of b in the high one."""

    def pick_bytes(self, a: Register, b: Register, order: Register) -> Register:
        """Four bytes of a (0 to 3) and b (4 to 7), the lowest first, as the lowest four nibbles of `order` say."""

    # Bits

    def count_bits(self, x: Register) -> Register:
        """How many bits are set."""

    def reverse_bits(self, x: Register) -> Register:
        """Bit 31 - b for bit b."""

    def highest_bit(self, x: Register) -> Register:
        """The position of the highest set bit; 2 ** 32 - 1 for 0."""

    def clear_bit(self, x: Register, position: Register) -> Register:
        """X with a set bit cleared; x where the position is above 31."""

    def shift_if_empty(self, queues: Sequence[Sequence[Register]]) -> list[list[Register]]:
        """Move each queue one place ahead in the lanes where the first register of the first queue is 0.

        The last register of a queue stays in its place as well.
        """

    def use_bit(self, queues: Sequence[Sequence[Register]], position: Register) -> list[list[Register]]:
        """Clear a bit of the first register of the first queue: `clear_bit`, then `shift_if_empty`, in fewer steps."""

    # The other lanes, and the other warps

    def shuffle(self, x: Register, source: Register) -> Register:
        """X (uint32 or float32) of lane `source`."""

    def transpose(self, x: Register) -> Register:
        """Of 8 x 8 halves, of which lane 4 g + t has columns 2 t and 2 t + 1 of row g: movmatrix.m8n8.trans."""

    def any(self, where: Register) -> Register:
        """Whether a predicate holds in any lane: the same answer in all."""

    def sync_warp(self) -> None:
        """Wait for the other lanes; their shared memory is then as they left it."""

    def sync_block(self) -> None:
        """Wait for the block's other warps; shared memory is then as they left it."""

    # Global memory

    def row(self, ref: Any, index: Register, nbytes: int) -> Any:
        """A pointer to row `index` of an array whose rows take `nbytes`."""

    def load(
        self,
        ref: Any,
        offset: Register,
        words: int,
        constant: int = 0,
        *,
        where: Register | None = None,
        early: bool = False,
    ) -> list[Register]:
        """Read 1, 2 or 4 words at byte `offset + constant`, aligned to as much; undefined where not `where`.

        For data that no one writes while the kernel runs. An assembler may put a load off until its result is wanted,
        to save registers; an `early` one is on its way before the next barrier (`sync_warp`, `sync_block`).
        """

    def store(self, ref: Any, offset: Register, x: Register, *, where: Register) -> None:
        """Write a word at a byte offset in the lanes where a predicate holds."""

    # Shared memory; addresses are bytes

    def load_shared(self, address: Register, words: int, constant: int = 0) -> list[Register]:
        """Read 1, 2 or 4 words at `address + constant`, aligned to as much."""

    def store_shared(
        self, address: Register, values: Sequence[Register], constant: int = 0, *, where: Register | None = None
    ) -> None:
        """Write 1, 2 or 4 words at `address + constant`, aligned to as much, in the lanes where a predicate holds."""

    def store_shared_half(self, address: Register, x: Register, half: int, *, where: Register | None = None) -> None:
        """Write the low (0) or high (1) half of a word, in the lanes where a predicate holds."""

    # Matrix products

    def multiply_add(
        self, a: Sequence[Register], b: Sequence[Register], c: Sequence[Register], *, float16: bool = False
    ) -> list[Register]:
        """c + a b for a [16, 16] and b [16, 8] of the dtype or float16, c float32 [16, 8]; mma.sync.m16n8k16.

        Lane 4 g + t holds, a word standing for two neighbours along the inner axis: a: rows g and g + 8 of columns
        2 t, 2 t + 1, then the same of columns 2 t + 8, 2 t + 9; b: rows 2 t, 2 t + 1, then 2 t + 8, 2 t + 9, of column
        g; c: columns 2 t and 2 t + 1 of row g, then of row g + 8.
        """

    # Control

    def loop(
        self,
        begin: Register,
        end: Register,
        step: int,
        carry: Sequence[Register],
        body: Callable[[Register, list[Register]], Sequence[Register]],
    ) -> list[Register]:
        """Carry values through body(i, carry) for i = begin, begin + step, ... below end."""

    def branch(
        self,
        where: Register,
        carry: Sequence[Register],
        then: Callable[[list[Register]], Sequence[Register]],
        otherwise: Callable[[list[Register]], Sequence[Register]] = lambda carry: carry,
    ) -> list[Register]:
        """then(carry) where a predicate holds, else otherwise(carry)."""
