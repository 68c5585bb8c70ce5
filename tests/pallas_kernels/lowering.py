"""Lowering for CUDA on a machine that has no GPU."""

import contextlib
import itertools
import random

import jax


def lower_for_cuda(function, *args):
    """The StableHLO text of jit(function) for CUDA; runs all of Pallas's lowering."""
    with _device():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _device():
    if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    facts = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132}
    try:
        device = AbstractDevice(**facts)
    except TypeError:  # jax 0.12 also wants the platform
        device = AbstractDevice(**facts, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def pairwise(axes, *, without=lambda _: False):
    """Cases, a dict each, in which any two values of any two axes occur together; few, and always the same.

    Args:
        axes: the values of each axis by name.
        without: which cases to leave out.
    """
    draw = random.Random(0)
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if not without({a: x, b: y})
    }

    def pairs(case):
        return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)} & missing

    cases = []
    while missing:
        drawn = [{axis: draw.choice(values) for axis, values in axes.items()} for _ in range(200)]
        wanted = dict(min(missing, key=lambda pair: sorted(map(repr, pair))))  # else the last few are long waited for
        best = max(
            ({**case, **wanted} for case in drawn if not without(case | wanted)), key=lambda case: len(pairs(case))
        )
        missing -= pairs(best)
        cases.append(best)
    return cases


def describe(case):
    """A case's name."""
    return " ".join(f"{axis}={getattr(x, '__name__', x)}" for axis, x in case.items())
