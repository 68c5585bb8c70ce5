"""`warp.Warp` on numpy arrays: runs a Mosaic GPU kernel anywhere, for tests.

Warps are threads that meet at barriers, lanes are elements of arrays of 32. A mistake that a GPU would forgive is an
error: an access outside of its memory or unaligned, a branch whose condition differs between lanes, two lanes that
touch the same shared memory with no barrier between (`Races`). Every word of shared memory starts as NaN.
"""
# ruff: noqa: D102  (the methods are described in warp.Warp)

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mustafar_jax.pallas_kernels.mosaic.warp import LANES

Register = np.ndarray
_LANE = np.arange(LANES)


class Block:
    """What a block's warps share."""

    def __init__(self, warps: int, shared_bytes: int) -> None:
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        self.barrier = threading.Barrier(warps)
        self.races = Races(shared_bytes)


class Races:
    """Finds lanes that touch the same shared memory, one of them to write, with no barrier between.

    It notes who wrote and who read each half of a word last: [lane, warp, time, block time], lanes counted through the
    block. A warp's time is the barriers that it has passed, the block time those of the whole block among them.
    """

    _SEVERAL = -1

    def __init__(self, nbytes: int) -> None:
        self._writes, self._reads = (np.full((4, nbytes // 2), -2) for _ in range(2))
        self._lock = threading.Lock()

    def read(self, halves: np.ndarray, now: "Moment") -> None:
        """Note that lanes read halves of words, [lanes, n]; RuntimeError where that depends on who comes first."""
        with self._lock:
            self._check(self._writes, halves, now)
            lane, warp, time, block_time = self._reads[:, halves]
            others = (block_time == now.block_time) & (warp != now.warp)
            beside = (block_time == now.block_time) & (time == now.time) & (lane != now.lanes)
            self._note(self._reads, halves, now)
            self._reads[1, halves[others]] = self._SEVERAL
            beside |= self._reads[0, halves] != now.lanes  # by the same instruction
            self._reads[0, halves[beside]] = self._SEVERAL

    def write(self, halves: np.ndarray, now: "Moment") -> None:
        """The same for what lanes are about to write."""
        with self._lock:
            self._check(self._writes, halves, now)
            self._check(self._reads, halves, now)
            self._note(self._writes, halves, now)

    @staticmethod
    def _note(notes: np.ndarray, halves: np.ndarray, now: "Moment") -> None:
        for i, x in enumerate(now):
            notes[i, halves] = x

    def _check(self, notes: np.ndarray, halves: np.ndarray, now: "Moment") -> None:
        lane, warp, time, block_time = notes[:, halves]
        before = (lane == now.lanes) | (block_time < now.block_time) | ((warp == now.warp) & (time < now.time))
        if not before.all():
            raise RuntimeError(f"no barrier between accesses of shared memory, at bytes {2 * halves[~before]}")


class Moment(NamedTuple):
    """Who touches shared memory, and when: see `Races`."""

    lanes: np.ndarray  # [lanes, 1]
    warp: int
    time: int
    block_time: int


def run(body: Callable[["Warp"], None], *, blocks: int, warps: int, shared_bytes: int, dtype: Any) -> None:
    """Run a kernel's blocks one after the other; an error in a warp is raised."""
    for number in range(blocks):
        block = Block(warps, shared_bytes)
        errors: list[BaseException] = []

        def work(warp: int, number: int = number, block: Block = block, errors: list[BaseException] = errors) -> None:
            try:
                body(Warp(dtype, block, number, warp))
            except threading.BrokenBarrierError:
                pass  # another warp has failed, and says why
            except BaseException as error:
                errors.append(error)
                block.barrier.abort()

        threads = [threading.Thread(target=work, args=(warp,)) for warp in range(warps)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class Warp:
    """One warp: see `warp.Warp`, which describes the methods."""

    def __init__(self, dtype: Any, block: Block, block_number: int, warp_number: int) -> None:
        self.dtype, self._block = np.dtype(dtype), block
        self._block_number, self._warp_number = block_number, warp_number
        self._time = self._block_time = 0

    def integer(self, x: int) -> Register:
        return np.full(LANES, x % 2**32, np.uint32)

    def number(self, x: float) -> Register:
        return np.full(LANES, x, np.float32)

    def lane(self) -> Register:
        return _LANE.astype(np.uint32)

    def warp(self) -> Register:
        return self.integer(self._warp_number)

    def block(self) -> Register:
        return self.integer(self._block_number)

    def select(self, where: Register, a: Register, b: Register) -> Register:
        return np.where(where, a, b)

    def maximum(self, a: Register, b: Register) -> Register:
        return np.fmax(a, b)

    def exp2(self, x: Register) -> Register:
        with np.errstate(invalid="ignore", over="ignore"):
            y = np.exp2(x)
        return np.where(np.abs(y) < np.finfo(np.float32).tiny, np.float32(0), y)

    def log2(self, x: Register) -> Register:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log2(np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x))

    def reciprocal(self, x: Register) -> Register:
        with np.errstate(divide="ignore", over="ignore"):
            return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.inf, x), 1 / x).astype(np.float32)

    def fused(self, a: Register, b: Register, c: Register) -> Register:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def as_float(self, x: Register) -> Register:
        return x.view(np.float32)

    def as_bits(self, x: Register) -> Register:
        return x.view(np.uint32)

    def pack_pair(self, low: Register, high: Register, *, float16: bool = False) -> Register:
        with np.errstate(over="ignore", invalid="ignore"):
            halves = [x.astype(self._kind(float16)).view(np.uint16).astype(np.uint32) for x in (low, high)]
        return halves[0] | halves[1] << 16

    def unpack_pair(self, x: Register, *, float16: bool = False) -> list[Register]:
        return [half.astype(np.float32) for half in self._halves(x, float16)]

    def pick_halves(self, a: Register, b: Register, half: int) -> Register:
        low, high = (x >> (16 * half) & 0xFFFF for x in (a, b))
        return low | high << 16

    def pick_bytes(self, a: Register, b: Register, order: Register) -> Register:
        source = np.stack([a, b], axis=1).view(np.uint8)
        chosen = order[:, None] >> (4 * np.arange(4, dtype=np.uint32)) & 7
        return np.ascontiguousarray(np.take_along_axis(source, chosen.astype(np.int64), axis=1)).view(np.uint32)[:, 0]

    def count_bits(self, x: Register) -> Register:
        return np.bitwise_count(x).astype(np.uint32)

    def reverse_bits(self, x: Register) -> Register:
        bits = np.unpackbits(x.view(np.uint8), bitorder="little").reshape(LANES, 32)
        return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.uint32)[:, 0]

    def highest_bit(self, x: Register) -> Register:
        return (np.frexp(x.astype(np.float64))[1] - 1).astype(np.int64).astype(np.uint32)

    def clear_bit(self, x: Register, position: Register) -> Register:
        return x ^ np.where(position < 32, np.uint32(1) << (position & 31), np.uint32(0))

    def shift_if_empty(self, queues: Sequence[Sequence[Register]]) -> list[list[Register]]:
        empty = queues[0][0] == 0
        return [[*(np.where(empty, b, a) for a, b in itertools.pairwise(q)), q[-1]] for q in queues]

    def use_bit(self, queues: Sequence[Sequence[Register]], position: Register) -> list[list[Register]]:
        [first, *rest], *others = queues
        return self.shift_if_empty([[self.clear_bit(first, position), *rest], *others])

    def shuffle(self, x: Register, source: Register) -> Register:
        return x[source & 31]

    def transpose(self, x: Register) -> Register:
        return np.ascontiguousarray(x.view(np.uint16).reshape(8, 8).T).view(np.uint32).reshape(LANES)

    def any(self, where: Register) -> Register:
        return np.full(LANES, where.any())

    def sync_warp(self) -> None:
        self._time += 1  # lanes move together

    def sync_block(self) -> None:
        self._block.barrier.wait()
        self._time += 1
        self._block_time += 1

    def row(self, ref: np.ndarray, index: Register, nbytes: int) -> np.ndarray:
        return ref[int(_uniform(index)) * nbytes :]

    def load(
        self,
        ref: np.ndarray,
        offset: Register,
        words: int,
        constant: int = 0,
        *,
        where: Register | None = None,
        early: bool = False,
    ) -> list[Register]:
        loaded = _read(ref, offset.astype(np.int64) + constant, words, where)
        return [np.ascontiguousarray(loaded[:, word]) for word in range(words)]

    def store(self, ref: np.ndarray, offset: Register, x: Register, *, where: Register) -> None:
        _write(ref, offset.astype(np.int64), x.view(np.uint32)[:, None].view(np.uint8), where)

    def load_shared(self, address: Register, words: int, constant: int = 0) -> list[Register]:
        place = address.astype(np.int64) + constant
        self._block.races.read(*self._halves_at(place, 4 * words, None))
        loaded = _read(self._block.shared, place, words, None)
        return [np.ascontiguousarray(loaded[:, word]) for word in range(words)]

    def store_shared(
        self, address: Register, values: Sequence[Register], constant: int = 0, *, where: Register | None = None
    ) -> None:
        stacked = np.stack([x.view(np.uint32) for x in values], axis=1)
        self._store_shared(address.astype(np.int64) + constant, stacked.view(np.uint8), where)

    def store_shared_half(self, address: Register, x: Register, half: int, *, where: Register | None = None) -> None:
        halves = (x >> (16 * half) & 0xFFFF).astype(np.uint16)[:, None]
        self._store_shared(address.astype(np.int64), halves.view(np.uint8), where)

    def _store_shared(self, address: np.ndarray, values: np.ndarray, where: Register | None) -> None:
        self._block.races.write(*self._halves_at(address, values.shape[1], where))
        _write(self._block.shared, address, values, where)
        written = _read_bytes(self._block.shared, address, values.shape[1], where)
        if (written != values[slice(None) if where is None else where]).any():
            raise RuntimeError("lanes store different values at one place of shared memory")

    def _halves_at(self, address: np.ndarray, nbytes: int, where: Register | None) -> tuple[np.ndarray, Moment]:
        """Halves of words that an access touches, and who makes it."""
        lanes = _LANE if where is None else _LANE[where]
        now = Moment(self._warp_number * LANES + lanes[:, None], self._warp_number, self._time, self._block_time)
        return _places(self._block.shared, address, nbytes, where)[:, ::2] // 2, now

    def multiply_add(
        self, a: Sequence[Register], b: Sequence[Register], c: Sequence[Register], *, float16: bool = False
    ) -> list[Register]:
        g, t = _LANE >> 2, _LANE & 3
        left, right, out = np.empty((16, 16)), np.empty((16, 8)), np.empty((16, 8))
        for i in range(4):
            for half, x in enumerate(self._halves(a[i], float16)):
                left[g + 8 * (i & 1), 2 * t + 8 * (i >> 1) + half] = x
        for i in range(2):
            for half, x in enumerate(self._halves(b[i], float16)):
                right[2 * t + 8 * i + half, g] = x
        with np.errstate(invalid="ignore", over="ignore"):
            product = left @ right
            for i in range(4):
                out[g + 8 * (i >> 1), 2 * t + (i & 1)] = c[i]
            out = (out + product).astype(np.float32)
        return [out[g + 8 * (i >> 1), 2 * t + (i & 1)] for i in range(4)]

    def loop(
        self,
        begin: Register,
        end: Register,
        step: int,
        carry: Sequence[Register],
        body: Callable[[Register, list[Register]], Sequence[Register]],
    ) -> list[Register]:
        carry = list(carry)
        for i in range(int(_uniform(begin)), int(_uniform(end)), step):
            carry = list(body(self.integer(i), carry))
        return carry

    def branch(
        self,
        where: Register,
        carry: Sequence[Register],
        then: Callable[[list[Register]], Sequence[Register]],
        otherwise: Callable[[list[Register]], Sequence[Register]] = lambda carry: carry,
    ) -> list[Register]:
        return list((then if _uniform(where) else otherwise)(list(carry)))

    def _halves(self, word: Register, float16: bool) -> list[np.ndarray]:
        return [x.astype(np.float64) for x in word.view(np.uint16).reshape(LANES, 2).view(self._kind(float16)).T]

    def _kind(self, float16: bool) -> np.dtype:
        return np.dtype(np.float16) if float16 else self.dtype


def _uniform(x: Register) -> Any:
    if not (x == x[0]).all():
        raise ValueError(f"lanes differ where they must agree: {x}")
    return x[0]


def _places(memory: np.ndarray, address: np.ndarray, nbytes: int, where: Register | None) -> np.ndarray:
    """Indices [lanes, nbytes] of the bytes accessed, in the lanes that access memory."""
    address = address if where is None else address[where]
    if (address % nbytes).any() or (address < 0).any() or (address + nbytes > memory.size).any():
        raise IndexError(f"access of {nbytes} bytes out of {memory.size}, or unaligned: {address}")
    return address[:, None] + np.arange(nbytes)


def _read(memory: np.ndarray, address: np.ndarray, words: int, where: Register | None) -> np.ndarray:
    loaded = np.full((LANES, 4 * words), 0xFF, np.uint8)
    loaded[slice(None) if where is None else where] = _read_bytes(memory, address, 4 * words, where)
    return loaded.view(np.uint32)


def _read_bytes(memory: np.ndarray, address: np.ndarray, nbytes: int, where: Register | None) -> np.ndarray:
    return memory[_places(memory, address, nbytes, where)]


def _write(memory: np.ndarray, address: np.ndarray, values: np.ndarray, where: Register | None) -> None:
    lanes = slice(None) if where is None else where
    memory[_places(memory, address, values.shape[1], where)] = values[lanes]
