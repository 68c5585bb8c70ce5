"""Where a measurement comes from."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jax


def where() -> dict[str, str]:
    """The device, the versions and the commit of a measurement: $MUSTAFAR_COMMIT, or that of the checkout."""
    return {
        "device": jax.devices()[0].device_kind,
        "matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "commit": os.environ.get("MUSTAFAR_COMMIT") or _commit() or "unknown",
    }


def _commit() -> str:
    """The checkout's commit; empty where there is none, or no git."""
    describe = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
