"""How many programs a process compiles for generations and scores, and how many it keeps."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

SHORTEST = 64
"""What shorter lengths are padded to."""

KEPT = 16
"""Programs that are kept of each kind, unless `keep_programs` raises it: those of the shapes that were used last."""

_made: list["LastPrograms"] = []


def padded(length: int, most: int) -> int:
    """The first of 64, 96, 128, 192, 256, 384, ... that is at least `length`; but not more than `most`."""
    power = 1 << (max(length, SHORTEST) - 1).bit_length()
    between = power // 4 * 3
    return min(between if max(length, SHORTEST) <= between else power, most)


def pad_tokens(tokens: np.ndarray, most: int) -> np.ndarray:
    """Tokens [B, S] with zeros on the right, so that there are `padded(S, most)` of each sequence."""
    return np.pad(tokens, ((0, 0), (0, padded(tokens.shape[1], most) - tokens.shape[1])))


class LastPrograms:
    """A function under `jax.jit`, of whose programs those of the `kept` shapes are kept that were used last.

    `jax.jit` alone keeps every program until `jax.clear_caches`, which takes those of the whole process.

    Attributes:
        kept: how many; may be changed at any time.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options, self.kept = function, options, KEPT
        self._last: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def of(self, *arguments: Any, **static: Any) -> Any:
        """The function under `jax.jit` that has the program of these arguments, or will: see `static_argnames`."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(static.items())
        if key not in self._last:
            self._last[key] = self._anew()
        self._last.move_to_end(key)
        while len(self._last) > self.kept:
            self._last.popitem(last=False)
        return self._last[key]

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Call it; positional arguments are arrays, those by keyword are static."""
        return self.of(*arguments, **static)(*arguments, **static)

    def _anew(self) -> Any:
        """The function under `jax.jit`, with programs of its own, which go when it does."""

        @functools.wraps(self.function)
        def own(*arguments: Any, **static: Any) -> Any:
            return self.function(*arguments, **static)

        return jax.jit(own, **self.options)


def last_programs(**options: Any) -> Callable[[Callable[..., Any]], LastPrograms]:
    """A decorator: see `LastPrograms`; with options of `jax.jit`."""

    def made_of(function: Callable[..., Any]) -> LastPrograms:
        _made.append(LastPrograms(function, **options))
        return _made[-1]

    return made_of


def keep_programs(count: int) -> None:
    """Keep the programs of at least so many shapes; of `KEPT` unless told. More memory, less compiling."""
    for function in _made:
        function.kept = max(function.kept, count)
