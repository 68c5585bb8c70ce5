"""Caches and a model on 8 devices: what one device gives, each device a part of the bytes, and little that moves."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from tests import quick
from tests.helpers import exhaustive

SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if shape[0] * shape[1] * shape[2] == 8]
MESHES = [dict(zip(("data", "tensor", "context"), shape, strict=True)) for shape in SHAPES]
QUICK = [
    {"sizes": {"data": 2, "tensor": 4}, "config": "coded"},
    {"sizes": {"data": 2, "tensor": 2, "context": 2}, "config": "coded"},
    {"sizes": {"context": 8}, "config": "coded"},
]
CONFIGS = ("pruned", "coded", "unequal", "dense")
ALL = [{"sizes": mesh, "config": config, "generates": True} for config in CONFIGS for mesh in MESHES]
LARGEST = 8 * 64 * 64 * 4
"""Bytes of what a step may move at a time: hidden states, logits, 8 parts of attention; a device's rows are more."""


FLAGS = quick.flags()


def found(cases, program="spread", flags=FLAGS):
    """What a program says of cases, compiled by these flags."""
    command = [sys.executable, "-W", "error", "-m", f"tests.mustafar_jax.{program}", json.dumps(cases)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(case, result):
    """One mesh and one config."""
    assert result["error"] < 1e-5 * result["largest"], (case, result)
    assert result.get("same text", True), case
    assert all(nbytes <= LARGEST for _, nbytes in result["step"]), (case, result)
    gathered = [kind for kind, _ in result["packing"] if kind != "all-reduce"]
    assert not gathered, (case, result)
    assert all(nbytes <= 1024 for _, nbytes in result["packing"]), (case, result)
    sizes = {"data": 1, "tensor": 1, "context": 1} | case["sizes"]
    fraction = 1 / (sizes["data"] * min(sizes["tensor"], 4) * sizes["context"])
    assert fraction <= result["share"] * 1.001 < fraction * 1.07, (case, result)  # groups are dealt out whole


def test_spread_caches_give_what_one_device_gives():
    for case, result in zip(QUICK, found(QUICK), strict=True):
        check(case, result)


@pytest.mark.parametrize("config", exhaustive(*CONFIGS))
def test_every_mesh_gives_what_one_device_gives(config):
    cases = [case for case in ALL if case["config"] == config]
    # Compiled quickly, values that several read are computed again and rounded otherwise: of a device's one sequence, a
    # channel's k-th largest may then miss itself.
    flags = "" if config == "unequal" else FLAGS
    for case, result in zip(cases, found(cases, flags=flags), strict=True):
        check(case, result)


WAYS = ("made by its device", "without jit", "by types", "by hand", "by hand, of its own")
KINDS = [(kind, how, is_set) for kind in ("Explicit", "Auto") for how in WAYS for is_set in (False, True)]


@pytest.mark.parametrize("cases", exhaustive((KINDS,)))
def test_axes_of_every_kind_serve_inside_and_outside_of_a_mesh_and_by_hand(cases):
    """By hand: with the check of what varies between devices."""
    for case, error in zip(cases, found(cases, "meshes"), strict=True):
        assert error < 1e-5, case
