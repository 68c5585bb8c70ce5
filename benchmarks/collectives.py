"""What a compiled program moves between devices, counted from its HLO."""

import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")

_RESULT = re.compile(r"= (\(?[^=]*?\)?) (" + "|".join(KINDS) + r")(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


class Collective(NamedTuple):
    """One collective: its kind, and the bytes of what each device has of it afterwards."""

    kind: str
    nbytes: int


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a program's optimised HLO, each counted once, also where it stands in a loop."""
    found = []
    for arrays, kind in _RESULT.findall(hlo):
        sizes = [_nbytes(dtype, shape) for dtype, shape in _ARRAY.findall(arrays)]
        found.append(Collective(kind, sum(sizes)))
    return found


def _nbytes(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
    return int(np.prod([int(size) for size in shape.split(",") if size], dtype=np.int64)) * bits // 8
