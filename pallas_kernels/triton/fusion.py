"""Many elementwise operations as one: what a function does to each thread's numbers, as a single inline assembly.

Compiling a Triton kernel takes a time that grows with the number of its loads and stores times the square of the number
of its operations: for each access, the coalescing pass collects all operations that are connected with it, and for each
of those all that come before and after. Straight-line code of thousands of operations so takes half a minute; as a few
operations of many instructions each, seconds.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from mustafar_jax.pallas_kernels.triton import language as tl

_INSTRUCTIONS = {
    ("add", "int32"): "add.s32",
    ("add", "float32"): "add.rn.f32",
    ("sub", "int32"): "sub.s32",
    ("sub", "float32"): "sub.rn.f32",
    ("mul", "int32"): "mul.lo.s32",
    ("mul", "float32"): "mul.rn.f32",
    ("div", "float32"): "div.rn.f32",
    ("sqrt", "float32"): "sqrt.rn.f32",
    ("min", "float32"): "min.f32",
    ("max", "float32"): "max.f32",
    ("lt", "float32"): "setp.lt.f32",
    ("gt", "float32"): "setp.gt.f32",
    ("and", "bool"): "and.pred",
    ("and", "int32"): "and.b32",
    ("or", "int32"): "or.b32",
    ("xor", "int32"): "xor.b32",
    ("neg", "int32"): "neg.s32",
    ("not", "int32"): "not.b32",
    ("shift_left", "int32"): "shl.b32",
    ("shift_right_arithmetic", "int32"): "shr.s32",
    ("shift_right_logical", "int32"): "shr.u32",
    ("population_count", "int32"): "popc.b32",
}
"""Of PTX, by a primitive's name and its operands' dtype. Each rounds by itself (.rn), so that none are contracted."""
_REGISTER = {"int32": "b32", "float32": "f32", "bool": "pred"}
_LETTER = {"int32": "r", "float32": "f"}
"""A dtype's register in PTX; and what stands for it in the constraints of an assembly."""


def fuse(function: Callable[..., Any], operands: Sequence[jax.Array], *shared: jax.Array, interpret: bool) -> jax.Array:
    """What a function makes of every thread's numbers, compiled as one operation.

    Args:
        function: called with a list for each operand, of its n columns [threads], and with `shared`; returns a list of
            n columns of one dtype, or one array [threads], which it must without operands. It consists of the
            operations in `_INSTRUCTIONS`, selections, casts of bits and helpers of `triton`.
        operands: int32 or float32 [threads, n], a row per thread, n a power of two. They must derive from loads of 16
            bytes per thread: only then does Triton keep a row in one thread, which is relied on.
        *shared: int32 [threads], or a `language.Memory`, which may also be the result.
        interpret: call the function as it is.

    Returns:
        [threads, n], or the one array that the function returned.

    Raises:
        TypeError: an operation that is not among these, numbers of another dtype, or what the function uses without
            being given it; not where it is interpreted.
        ValueError: the function returned something else.
    """
    if interpret:
        results = function([tl.unstack(x) for x in operands], *shared)
        return tl.stack(results) if isinstance(results, list) else results
    columns = [[jax.ShapeDtypeStruct((), x.dtype)] * x.shape[1] for x in operands]
    scalars = [jax.ShapeDtypeStruct((), x.dtype) for x in shared]
    jaxpr, results = jax.make_jaxpr(function, return_shape=True)(columns, *scalars)
    is_row, pack = isinstance(results, list), operands[0].shape[1] if operands else 1
    wanted = (pack if operands else 0) if is_row else 1
    if len({x.dtype for x in jaxpr.out_avals}) != 1 or len(jaxpr.out_avals) != wanted:
        raise ValueError(f"function returned {results}; wanted one array, or a list of {pack} columns of one dtype")
    if jaxpr.out_avals[0].dtype.name not in _LETTER or any(isinstance(x, jax.core.Tracer) for x in jaxpr.consts):
        raise TypeError(f"function returned {results}, from its operands and {jaxpr.consts}, which cannot be fused")
    if operands:  # all are to have one shape: these are repeated, and of the repetitions the first is read
        shared = tuple(jnp.broadcast_to(x[:, None], operands[0].shape) for x in shared)
    result = _issue(jaxpr, operands, shared, pack)
    return result if is_row or not operands else tl.unstack(result)[0]


def _issue(jaxpr: ClosedJaxpr, operands: Sequence[jax.Array], shared: Sequence[jax.Array], pack: int) -> jax.Array:
    """The jaxpr of `pack` columns of each operand and one of each that is shared, as an assembly."""
    results, *others = ([f"${pack * i + k}" for k in range(pack)] for i in range(1 + len(operands) + len(shared)))
    places = [place for columns in others[: len(operands)] for place in columns]
    places += [columns[0] for columns in others[len(operands) :]]
    program = _Program()
    code = program.finish(results, program.add(jaxpr, places))
    kind, whole = jaxpr.out_avals[0].dtype, [*operands, *shared]
    constraints = [f"={_LETTER[kind.name]}"] * pack + [_LETTER[x.dtype.name] for x in whole for _ in range(pack)]
    return tl.assembly(code, whole, ",".join(constraints), dtype=kind, pack=pack)


class _Program:
    """PTX of the operations that are added to it; registers are named, v0, v1 and so on."""

    def __init__(self) -> None:
        self._code: list[str] = []
        self._names = (f"v{i}" for i in itertools.count())

    def add(self, jaxpr: ClosedJaxpr, operands: Sequence[str]) -> list[str]:
        """Add a jaxpr's operations, on these registers; the registers of its results."""
        places: dict[Any, str] = dict(zip(jaxpr.jaxpr.invars, operands, strict=True))
        places.update((x, _number(value, x)) for x, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))

        def place(atom: Any) -> str:
            return _number(atom.val, atom) if isinstance(atom, Literal) else places[atom]

        for equation in jaxpr.eqns:
            results = self._operation(equation, [place(x) for x in equation.invars])
            places.update(zip(equation.outvars, results, strict=True))
        return [place(x) for x in jaxpr.jaxpr.outvars]

    def finish(self, targets: Sequence[str], results: Sequence[str]) -> str:
        """The whole program, which ends with moving results to targets, one result to all if there is one."""
        # by way of copies: a target may be the register of an operand, to be read before
        copies = [self._instruction("mov.b32", "int32", [x]) for x in results]
        copies *= len(targets) // len(copies)
        moves = [f"mov.b32 {target}, {x};" for target, x in zip(targets, copies, strict=True)]
        return " ".join(["{", *self._code, *moves, "}"])

    def _operation(self, equation: JaxprEqn, operands: list[str]) -> list[str]:
        name, params = equation.primitive.name, equation.params
        kinds = [_kind(x) for x in equation.outvars]
        if name in ("jit", "pjit"):
            return self.add(params["jaxpr"], operands)
        if name.startswith("elementwise_inline_asm"):  # until jax 0.11 with "_p" behind it
            results = [self._register(kind) for kind in kinds]
            self._code.append(_with_operands(params["asm"], results + operands))
            return results
        if name == "broadcast_in_dim" or (name == "convert_element_type" and kinds[0] == _kind(equation.invars[0])):
            return operands  # of a number, to the same number
        if name == "bitcast_convert_type":
            return [self._instruction("mov.b32", kinds[0], operands)]
        if name == "select_n" and kinds[0] != "bool":
            where, otherwise, then = operands
            return [self._instruction("selp.b32", kinds[0], [then, otherwise, where])]
        instruction = _INSTRUCTIONS.get((name, _kind(equation.invars[0])))
        if instruction is None:
            raise TypeError(f"{equation} cannot be fused")
        return [self._instruction(instruction, kinds[0], operands)]

    def _instruction(self, name: str, kind: str, operands: Sequence[str]) -> str:
        """Add one; the register of its result."""
        result = self._register(kind)
        self._code.append(f"{name} {', '.join([result, *operands])};")
        return result

    def _register(self, kind: str) -> str:
        """A new one of a dtype."""
        if kind not in _REGISTER:
            raise TypeError(f"{kind} cannot be fused; wanted one of {[*_REGISTER]}")
        name = next(self._names)
        self._code.append(f".reg .{_REGISTER[kind]} {name};")
        return name


def _kind(atom: Any) -> str:
    """The dtype's name of a variable or constant in a jaxpr."""
    name: str = atom.aval.dtype.name
    return name


def _number(x: Any, atom: Any) -> str:
    """A constant in PTX, by its bits; `atom` is what it is in a jaxpr."""
    kind = _kind(atom)
    return f"{'0f' if kind == 'float32' else '0x'}{np.asarray(x, kind).view(np.uint32):08x}"


def _with_operands(code: str, operands: Sequence[str]) -> str:
    """Inline assembly, its operands $0, $1, ... replaced."""
    return re.sub(r"\$(\d+)", lambda match: operands[int(match[1])], code)
