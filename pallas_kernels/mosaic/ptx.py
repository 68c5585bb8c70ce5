"""`warp.Warp` as PTX: each method is one instruction or a few, emitted inline."""
# ruff: noqa: D102  (the methods are described in warp.Warp)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from mustafar_jax.pallas_kernels.mosaic.warp import LANES

_COMPARE_INT = {"==": arith.CmpIPredicate.eq, "<": arith.CmpIPredicate.ult, ">": arith.CmpIPredicate.ugt}
_COMPARE_FLOAT = {"==": arith.CmpFPredicate.OEQ, "<": arith.CmpFPredicate.OLT, ">": arith.CmpFPredicate.OGT}
_INT = {
    "+": arith.addi,
    "-": arith.subi,
    "*": arith.muli,
    "//": arith.divui,
    "%": arith.remui,
    "&": arith.andi,
    "|": arith.ori,
    "^": arith.xori,
    "<<": arith.shli,
    ">>": arith.shrui,
}
_FLOAT = {"+": arith.addf, "-": arith.subf, "*": arith.mulf}


class Register:
    """A register of a `Warp`: uint32, float32 or a predicate in each lane."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: ir.Value) -> None:
        self.value = value

    def _binary(self, name: str, other: Register | float) -> Register:
        kind = self.value.type
        b = other.value if isinstance(other, Register) else _constant(kind, other)
        if kind == ir.F32Type.get():
            if name in _COMPARE_FLOAT:
                return Register(arith.cmpf(_COMPARE_FLOAT[name], self.value, b))
            return Register(_FLOAT[name](self.value, b))
        if name in _COMPARE_INT:
            return Register(arith.cmpi(_COMPARE_INT[name], self.value, b))
        return Register(_INT[name](self.value, b))

    def __add__(self, other: Register | float) -> Register:
        return self._binary("+", other)

    def __sub__(self, other: Register | float) -> Register:
        return self._binary("-", other)

    def __mul__(self, other: Register | float) -> Register:
        return self._binary("*", other)

    def __floordiv__(self, other: Register | int) -> Register:
        return self._binary("//", other)

    def __mod__(self, other: Register | int) -> Register:
        return self._binary("%", other)

    def __and__(self, other: Register | int) -> Register:
        return self._binary("&", other)

    def __or__(self, other: Register | int) -> Register:
        return self._binary("|", other)

    def __xor__(self, other: Register | int) -> Register:
        return self._binary("^", other)

    def __lshift__(self, other: Register | int) -> Register:
        return self._binary("<<", other)

    def __rshift__(self, other: Register | int) -> Register:
        return self._binary(">>", other)

    def __eq__(self, other: Register | float) -> Register:  # type: ignore[override]
        return self._binary("==", other)

    def __lt__(self, other: Register | float) -> Register:
        return self._binary("<", other)

    def __gt__(self, other: Register | float) -> Register:
        return self._binary(">", other)


@dataclasses.dataclass(frozen=True)
class Teams:
    """Blocks of a kernel that are launched as one block. They share its memory's size, not its memory.

    Attributes:
        count: of a launched block.
        warps: of each.
        blocks: of the kernel; where their number is not a multiple, the last one is run more than once.
    """

    count: int
    warps: int
    blocks: int


class Warp:
    """Emits the instructions of one warp into the MLIR module under construction.

    Attributes:
        dtype: of 16-bit operands, bfloat16 or float16.
        teams: how blocks are launched; None for each by itself.
    """

    def __init__(self, dtype: Any, teams: Teams | None = None) -> None:
        self.dtype = "bf16" if dtype == jnp.bfloat16 else "f16"
        self.teams = teams
        # grids have one dimension, which the assembler cannot know: see `shift_if_empty`
        self._one = self._pure("mov.u32 $0, %nctaid.y;", [])

    # Numbers and where we are

    def integer(self, x: int) -> Register:
        return Register(_constant(_u32(), x))

    def number(self, x: float) -> Register:
        return Register(_constant(ir.F32Type.get(), x))

    def lane(self) -> Register:
        return self._pure("mov.u32 $0, %laneid;", [])

    def warp(self) -> Register:
        warp = self._warp_of_launch()
        return warp if self.teams is None else warp % self.teams.warps

    def block(self) -> Register:
        block = self._pure("mov.u32 $0, %ctaid.x;", [])
        if self.teams is None:
            return block
        block, last = block * self.teams.count + self._team(), self.integer(self.teams.blocks - 1)
        return self.select(block < last, block, last)

    # Arithmetic

    def select(self, where: Register, a: Register, b: Register) -> Register:
        return Register(arith.select(where.value, a.value, b.value))

    def maximum(self, a: Register, b: Register) -> Register:
        return Register(arith.maxnumf(a.value, b.value))

    def exp2(self, x: Register) -> Register:
        return self._pure("ex2.approx.ftz.f32 $0, $1;", [x], result="f")

    def log2(self, x: Register) -> Register:
        return self._pure("lg2.approx.ftz.f32 $0, $1;", [x], result="f")

    def reciprocal(self, x: Register) -> Register:
        return self._pure("rcp.approx.ftz.f32 $0, $1;", [x], result="f")

    def fused(self, a: Register, b: Register, c: Register) -> Register:
        return self._pure("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], result="f")

    def as_float(self, x: Register) -> Register:
        return Register(arith.bitcast(ir.F32Type.get(), x.value))

    def as_bits(self, x: Register) -> Register:
        return Register(arith.bitcast(_u32(), x.value))

    def pack_pair(self, low: Register, high: Register, *, float16: bool = False) -> Register:
        return self._pure(f"cvt.rn.{self._kind(float16)}x2.f32 $0, $1, $2;", [high, low])

    def unpack_pair(self, x: Register, *, float16: bool = False) -> list[Register]:
        converted = " ".join(f"cvt.f32.{self._kind(float16)} ${i}, {half};" for i, half in enumerate("lh"))
        code = f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $2; {converted} }}"
        return self._asm(code, ["f", "f"], None, [x], effects=False)

    def pick_halves(self, a: Register, b: Register, half: int) -> Register:
        return self._pure(f"prmt.b32 $0, $1, $2, {('0x5410', '0x7632')[half]};", [a, b])

    def pick_bytes(self, a: Register, b: Register, order: Register) -> Register:
        return self._pure("prmt.b32 $0, $1, $2, $3;", [a, b, order])

    # Bits

    def count_bits(self, x: Register) -> Register:
        return self._pure("popc.b32 $0, $1;", [x])

    def reverse_bits(self, x: Register) -> Register:
        return self._pure("brev.b32 $0, $1;", [x])

    def highest_bit(self, x: Register) -> Register:
        return self._pure("bfind.u32 $0, $1;", [x])

    def clear_bit(self, x: Register, position: Register) -> Register:
        return self._pure("{ .reg .b32 bit; shl.b32 bit, 1, $2; xor.b32 $0, $1, bit; }", [x, position])

    def shift_if_empty(self, queues: Sequence[Sequence[Register]]) -> list[list[Register]]:
        return self._shift(queues, "setp.ne.u32 left, $0, 0;")

    def use_bit(self, queues: Sequence[Sequence[Register]], position: Register) -> list[list[Register]]:
        # a logic instruction says itself whether its result is 0
        clear = "shl.b32 bit, 1, $POSITION; setp.ne.u32 no, 0, 0; lop3.or.b32 $0|left, $0, bit, 0, 0x3c, no;"
        return self._shift(queues, f"{{ .reg .b32 bit; .reg .pred no; {clear} }}", position)

    def _shift(self, queues: Sequence[Sequence[Register]], test: str, *operands: Register) -> list[list[Register]]:
        """Move queues ahead unless there is something `left` of $0, the first register; $POSITION is the operand."""
        moved = [(q, i) for q in range(len(queues)) for i in range(len(queues[q]) - 1)]
        n, last = len(moved), {q: len(moved) + k for k, q in enumerate(range(len(queues)))}
        place = {key: k for k, key in enumerate(moved)}

        def source(q: int, i: int) -> int:
            return place[q, i] if (q, i) in place else last[q]

        # moves, written as products with 1: as such they would become selections, which take turns with the other
        # instructions of a walk through bits, while multipliers are idle
        one = n + len(queues)
        code = "".join(f" @!left mad.lo.u32 ${source(q, i)}, ${source(q, i + 1)}, ${one}, 0;" for q, i in moved)
        # a digit: the same register as that result
        constraints = ["r"] * (one + 1 - n + len(operands)) + [str(k) for k in range(n)]
        arguments = [queue[-1] for queue in queues] + [self._one, *operands] + [queues[q][i] for q, i in moved]
        code = f"{{ .reg .pred left; {test.replace('$POSITION', f'${one + 1}')}{code} }}"
        # &: results are written while other operands are still to be read, so they share no register with these
        results = self._asm(code, ["&r"] * n, constraints, arguments, effects=False)
        return [[results[place[q, i]] for i in range(len(queue) - 1)] + [queue[-1]] for q, queue in enumerate(queues)]

    # The other lanes, and the other warps

    def shuffle(self, x: Register, source: Register) -> Register:
        kind = "f" if x.value.type == ir.F32Type.get() else "r"
        return self._effect("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", [x, source], [kind])[0]

    def transpose(self, x: Register) -> Register:
        return self._effect("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [x], ["r"])[0]

    def any(self, where: Register) -> Register:
        code = "{ .reg .pred p; vote.sync.any.pred p, $1, 0xffffffff; selp.u32 $0, 1, 0, p; }"
        return self._effect(code, [where], ["r"])[0] > 0

    def sync_warp(self) -> None:
        self._effect("bar.warp.sync 0xffffffff;", [], [])

    def sync_block(self) -> None:
        if self.teams is None:
            self._effect("bar.sync 0;", [], [])
        else:
            self._effect(f"bar.sync $0, {LANES * self.teams.warps};", [self._team() + 1], [])

    # Global memory

    def row(self, ref: ir.Value, index: Register, nbytes: int) -> ir.Value:
        wide = ir.IntegerType.get_signless(64)
        offset = arith.muli(arith.extui(wide, index.value), arith.constant(wide, nbytes))
        return arith.addi(ref, offset)

    def load(
        self,
        ref: ir.Value,
        offset: Register,
        words: int,
        constant: int = 0,
        *,
        where: Register | None = None,
        early: bool = False,
    ) -> list[Register]:
        pointer = arith.addi(ref, arith.extui(ir.IntegerType.get_signless(64), offset.value))
        kind = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[words]
        results = _braces(range(words))
        arguments = [pointer] if where is None else [pointer, where.value]
        guard = "" if where is None else f"@${words + 1} "
        # barriers do not order what is read as constant
        space = "global" if early else "global.nc"
        code = f"{guard}ld.{space}.L1::no_allocate.{kind} {results}, [${words}+{constant}];"
        return self._effect(code, arguments, ["r"] * words)

    def store(self, ref: ir.Value, offset: Register, x: Register, *, where: Register) -> None:
        pointer = arith.addi(ref, arith.extui(ir.IntegerType.get_signless(64), offset.value))
        self._effect("@$0 st.global.b32 [$1], $2;", [where, pointer, x], [])

    # Shared memory; addresses are bytes

    def load_shared(self, address: Register, words: int, constant: int = 0) -> list[Register]:
        kind = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[words]
        code = f"ld.shared.{kind} {_braces(range(words))}, [${words}+{constant}];"
        return self._effect(code, [address], ["r"] * words)

    def store_shared(
        self, address: Register, values: Sequence[Register], constant: int = 0, *, where: Register | None = None
    ) -> None:
        kind = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[len(values)]
        guard = "" if where is None else f"@${len(values) + 1} "
        code = f"{guard}st.shared.{kind} [$0+{constant}], {_braces(range(1, len(values) + 1))};"
        self._effect(code, [address, *values] if where is None else [address, *values, where], [])

    def store_shared_half(self, address: Register, x: Register, half: int, *, where: Register | None = None) -> None:
        guard = "" if where is None else "@$2 "
        code = f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; {guard}st.shared.b16 [$0], {'lh'[half]}; }}"
        self._effect(code, [address, x] if where is None else [address, x, where], [])

    # Matrix products

    def multiply_add(
        self, a: Sequence[Register], b: Sequence[Register], c: Sequence[Register], *, float16: bool = False
    ) -> list[Register]:
        kind = self._kind(float16)
        code = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        code += ", ".join(_braces(r) for r in (range(4), range(4, 8), range(8, 10), range(10, 14))) + ";"
        return self._effect(code, [*a, *b, *c], ["f"] * 4)

    # Control

    def loop(
        self,
        begin: Register,
        end: Register,
        step: int,
        carry: Sequence[Register],
        body: Callable[[Register, list[Register]], Sequence[Register]],
    ) -> list[Register]:
        operation = scf.ForOp(begin.value, end.value, _constant(_u32(), step), [x.value for x in carry])
        with ir.InsertionPoint(operation.body):
            arguments = [Register(x) for x in operation.inner_iter_args]
            results = body(Register(operation.induction_variable), arguments)
            scf.yield_([x.value for x in results])
        return [Register(x) for x in operation.results]

    def branch(
        self,
        where: Register,
        carry: Sequence[Register],
        then: Callable[[list[Register]], Sequence[Register]],
        otherwise: Callable[[list[Register]], Sequence[Register]] = lambda carry: carry,
    ) -> list[Register]:
        operation = scf.IfOp(where.value, [x.value.type for x in carry])
        operation.regions[1].blocks.append()  # versions of jax spell the argument for an else block differently
        for region, function in zip(operation.regions, (then, otherwise), strict=True):
            with ir.InsertionPoint(region.blocks[0]):
                scf.yield_([x.value for x in function(list(carry))])
        return [Register(x) for x in operation.results]

    # How blocks are launched

    def _team(self) -> Register:
        """Which of the launched block's teams this is."""
        assert self.teams
        return self._warp_of_launch() // self.teams.warps

    def _warp_of_launch(self) -> Register:
        return self._pure("{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 5; }", [])

    # How instructions are emitted

    def _kind(self, float16: bool) -> str:
        return "f16" if float16 else self.dtype

    def _pure(self, code: str, arguments: list[Register], result: str = "r") -> Register:
        """An instruction of one result that nothing but its operands decides."""
        return self._asm(code, [result], None, arguments, effects=False)[0]

    def _effect(self, code: str, arguments: Sequence[Any], results: list[str]) -> list[Register]:
        """An instruction that reads or writes memory, or waits for others: kept in order with its like."""
        return self._asm(code, results, None, arguments, effects=True)

    def _asm(
        self, code: str, results: list[str], constraints: list[str] | None, arguments: Sequence[Any], *, effects: bool
    ) -> list[Register]:
        """Inline assembly; results and constraints (of the arguments; by their types if None) are letters: r, f; &r."""
        values = [x.value if isinstance(x, Register) else x for x in arguments]
        text = ",".join([f"={r}" for r in results] + (constraints or [_letter(x) for x in values]))
        types = [ir.F32Type.get() if r == "f" else _u32() for r in results]
        if len(types) > 1:
            struct = llvm.StructType.get_literal(types)
            result = llvm.inline_asm(struct, values, code, text, has_side_effects=effects)
            return [Register(llvm.extractvalue(t, result, [i])) for i, t in enumerate(types)]
        result = llvm.inline_asm(
            types[0] if types else ir.Type.parse("!llvm.void"), values, code, text, has_side_effects=effects
        )
        return [Register(result)] if types else []


def memory_of(warp: Warp, shared: Register, nbytes: int) -> Register:
    """Where the memory, of so many bytes, of a warp's block begins in that of the launched block."""
    return shared if warp.teams is None else shared + warp._team() * nbytes


def _u32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _letter(x: ir.Value) -> str:
    """The inline assembly constraint of a value's type."""
    return {"f32": "f", "i1": "b", "i32": "r", "i64": "l"}[str(x.type)]


def _constant(kind: ir.Type, x: float) -> ir.Value:
    if kind == ir.F32Type.get():
        return arith.constant(kind, float(x))
    return arith.constant(kind, (int(x) + 2**31) % 2**32 - 2**31)


def _braces(numbers: range) -> str:
    """Operands as a vector: {$0, $1}; a single one without braces."""
    text = ", ".join(f"${n}" for n in numbers)
    return f"{{{text}}}" if len(numbers) > 1 else text
