"""Print the newest python3.x of this machine, for `make test-latest`; fail where none is newer than the one running.

Looks on PATH and among pyenv's versions, for the versions that pyproject.toml's `requires-python` admits.
"""

from __future__ import annotations  # this also runs on a python3 that is too old for the package

import os
import pathlib
import subprocess
import sys

NEWEST_SUPPORTED = 13


def candidates(minor: int) -> list[pathlib.Path]:
    """Where a python3.<minor> may stand."""
    name = f"python3.{minor}"
    on_path = [pathlib.Path(folder) / name for folder in os.environ.get("PATH", "").split(os.pathsep)]
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    return on_path + sorted(pyenv.glob(f"versions/3.{minor}.*/bin/{name}"), reverse=True)


def runs(python: pathlib.Path, minor: int) -> bool:
    """Whether this is a working Python 3.<minor>: pyenv puts commands on PATH for versions that are not active."""
    check = f"import sys, venv; sys.exit(sys.version_info[:2] != (3, {minor}))"
    try:
        return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def main() -> None:
    """Print the path, or say why there is none."""
    for minor in range(NEWEST_SUPPORTED, max(sys.version_info.minor, 10), -1):
        for python in candidates(minor):
            if runs(python, minor):
                print(python)
                return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    sys.exit(f"test-latest: no Python newer than {version} and at most 3.{NEWEST_SUPPORTED} on this machine; stopped")


if __name__ == "__main__":
    main()
