"""Installations of a copy of the checkout: every file is there, and tools outside of the checkout find them."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.helpers import exhaustive

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "mustafar_jax", "models", "pallas_kernels")
KINDS = ("editable", *exhaustive("plain", "sdist"))


def package_files(folder):
    """All files of the package in a folder, links followed, as `mustafar_jax/...`."""
    found = set()
    for where, folders, names in os.walk(folder / "mustafar_jax", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {(pathlib.Path(where) / name).relative_to(folder).as_posix() for name in names}
    return found


def run(*command, cwd, status=0):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


def pip(*arguments, cwd):
    """Without an index: what building needs is in this environment."""
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-index", "--no-deps")
    return run(*command, "--no-build-isolation", cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, links as links, so that building leaves nothing in the checkout and finds nothing left there."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    assert package_files(folder) == package_files(ROOT)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=checkout)
    [archive] = folder.iterdir()
    return archive


@pytest.fixture(scope="module", params=KINDS)
def python(request, checkout, tmp_path_factory):
    """The Python of an environment with the package installed, and what it depends on from the one that runs this."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = pathlib.Path(sysconfig.get_path("purelib", "venv", scheme))
    # a folder that is named in a .pth is searched, but .pth files in it, of editable installations, are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    how = {"plain": [checkout], "editable": ["--editable", checkout]}
    source = how.get(request.param) or [request.getfixturevalue("sdist")]
    pip("install", "--quiet", "--target", packages, *source, cwd=folder)
    return pathlib.Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"


def test_a_wheel_from_the_sdist_holds_every_file(sdist, checkout, tmp_path):
    pip("wheel", "--quiet", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    [wheel] = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("mustafar_jax/")}
    assert held == package_files(checkout)
    assert {"mustafar_jax/py.typed", "mustafar_jax/pallas_kernels/tuned.json", "mustafar_jax/models/llama.py"} <= held


def test_an_installation_holds_every_file_and_runs_from_elsewhere(python, checkout, tmp_path):
    program = "import mustafar_jax, mustafar_jax.models, mustafar_jax.quality.session; print(mustafar_jax.__file__)"
    init = pathlib.Path(run(python, "-c", program, cwd=tmp_path).strip())
    assert not init.is_relative_to(ROOT)
    assert package_files(init.parents[1]) == package_files(checkout)
    assert run(python, "-m", "mustafar_jax", "--version", cwd=tmp_path).startswith("mustafar_jax ")


def test_mypy_resolves_every_module_from_elsewhere(python, checkout, tmp_path):
    parts = (pathlib.PurePath(name).with_suffix("").parts for name in package_files(checkout) if name.endswith(".py"))
    modules = sorted(".".join(part).removesuffix(".__init__") for part in parts)
    assert len(modules) > 60
    imports = [f"import {module}" for module in modules]
    (tmp_path / "uses.py").write_text("\n".join([*imports, "import mustafar_jax.models.nonsense"]) + "\n")
    # what the modules hold is checked elsewhere: here it is whether they are found
    mypy = (sys.executable, "-m", "mypy", "--follow-imports", "skip", "--cache-dir", tmp_path / "cache")
    said = run(*mypy, "--python-executable", python, "uses.py", cwd=tmp_path, status=1)
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"uses.py:{len(imports) + 1}: error: ")
    assert errors[0].endswith("[import-not-found]")


@pytest.mark.exhaustive
def test_programs_of_the_checkout_take_its_own_package(python):
    program = "from importlib.util import find_spec; print(find_spec('mustafar_jax.models').origin)"
    assert run(python, "-c", program, cwd=ROOT).strip() == str(ROOT / "mustafar_jax" / "models" / "__init__.py")
    said = run(python, "-m", "benchmarks.bars", "benchmarks/results/NVIDIA_H100_80GB_HBM3", cwd=ROOT)
    assert said.startswith("pass ")
