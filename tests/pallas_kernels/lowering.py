"""Lowering for CUDA on a machine that has no GPU."""

import contextlib

import jax


def lower_for_cuda(function, *args):
    """The StableHLO text of jit(function) for CUDA; runs all of Pallas's lowering to Triton."""
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
