"""How the four packages hang together: which imports which, what importing costs, and what they export."""

import ast
import functools
import graphlib
import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = {
    "mustafar_jax": ROOT / "mustafar_jax",
    "mustafar_jax.models": ROOT / "models",
    "mustafar_jax.pallas_kernels": ROOT / "pallas_kernels",
    "mustafar_jax.quality": ROOT / "mustafar_jax" / "quality",
}


def files(package: str) -> list[pathlib.Path]:
    """Its files, those of other packages of the list left out."""
    others = [folder for name, folder in PACKAGES.items() if name != package]
    found = sorted(PACKAGES[package].glob("**/*.py"))  # which follows no links
    found = [
        file for file in found if not any(file.is_relative_to(folder) for folder in others if package == "mustafar_jax")
    ]
    assert found
    return found


@functools.cache
def imports(file: pathlib.Path, *, lazy: bool) -> frozenset[str]:
    """What a file imports, as `package.module.name`: when it is imported itself, or later in functions, too."""
    return frozenset(_imports(ast.parse(file.read_text(encoding="utf-8")), lazy))


def _imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0
        yield from (f"{node.module}.{name.name}" for name in node.names)
    for child in children:
        yield from _imports(child, lazy)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_third_party(module: str) -> bool:
    top = module.split(".")[0]
    return top not in sys.stdlib_module_names and top != "mustafar_jax"


def test_imports_are_found():
    source = """
import a.b, c
if TYPE_CHECKING:
    from d import e
else:
    import f
class G:
    from h import i
    def later(self):
        import j
"""
    tree = ast.parse(source)
    assert set(_imports(tree, lazy=False)) == {"a.b", "c", "f", "h.i"}
    assert set(_imports(tree, lazy=True)) == {"a.b", "c", "f", "h.i", "j"}


BELOW_THE_KERNELS = (
    "backend", "codecs", "layout", "operands", "pruning", "rope", "rotation", "rows", "sharding", "writes",
)  # fmt: skip
"""What the kernels may import of the library: what is given to them, and what that is made of."""


@pytest.mark.parametrize("file", files("mustafar_jax.pallas_kernels"), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_kernels_depend_on_jax_and_what_is_below_them_alone(file):
    # jaxlib, jax's other half, holds the MLIR that Mosaic GPU kernels are written in
    allowed = {"jax", "numpy"} | ({"jaxlib"} if file.name in ("lowering.py", "ptx.py") else set())
    below = [f"mustafar_jax.{name}" for name in BELOW_THE_KERNELS]
    for module in imports(file, lazy=True):
        assert not is_third_party(module) or module.split(".")[0] in allowed
        if within(module, "mustafar_jax"):
            assert any(within(module, name) for name in ["mustafar_jax.pallas_kernels", *below]), module


def test_what_is_below_the_kernels_needs_nothing_above():
    """So that no circle comes about."""
    below = {f"mustafar_jax.{name}" for name in BELOW_THE_KERNELS}
    for name in below:
        path = ROOT / (name.replace(".", "/") + ".py")
        for file in [path] if path.exists() else sorted(path.with_suffix("").glob("*.py")):
            for module in imports(file, lazy=True):
                assert not within(module, "mustafar_jax") or any(within(module, other) for other in below), module


ORDER = (
    ("cli", "__main__"),
    ("quality",),
    ("models",),
    ("generation",),
    ("attention", "blocks", "explain", "products"),
    ("cache",),
    ("backends",),
    ("pallas_kernels",),
    ("backend", "operands", "config"),
    ("rows", "codecs", "layout", "pruning", "rope", "rotation", "writes", "sharding", "interop", "arguments"),
)
"""The rows of CONTRIBUTING's table: each may import those below it."""


def row_of(module: str) -> int | None:
    """Which of `ORDER` a module is in; None for what is not of the library, and for the library's own front."""
    part = module.removeprefix("mustafar_jax.").split(".")[0] if within(module, "mustafar_jax") else ""
    return next((row for row, parts in enumerate(ORDER) if part in parts), None)


def test_imports_go_one_way():
    for name, file in all_modules().items():
        own = row_of(name)
        assert own is not None or name == "mustafar_jax", f"{name} is in no row of ORDER"
        below = [row for module in imports(file, lazy=True) if (row := row_of(module)) is not None]
        assert own is None or not below or min(below) >= own, name


def all_modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its name."""
    modules: dict[str, pathlib.Path] = {}
    for package, folder in PACKAGES.items():
        for file in files(package):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return modules


def module_of(name: str, modules: Collection[str]) -> str | None:
    """The module that `package.module.name` is of; the longest name wins."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in modules), None)


def test_there_is_no_circle_of_imports():
    """Not even one that a function's import closes."""
    modules = all_modules()
    graph = {
        name: {module_of(found, modules) for found in imports(file, lazy=True)} - {None, name}
        for name, file in modules.items()
    }
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("backend", ["mosaic", "triton"])
def test_the_backends_of_kernels_are_apart(backend):
    kernels = "mustafar_jax.pallas_kernels"
    [other] = {"mosaic", "triton"} - {backend}
    found = [file for file in files(kernels) if backend in file.parts]
    assert found
    for file in found:
        assert not [module for module in imports(file, lazy=True) if within(module, f"{kernels}.{other}")], file.name


@pytest.mark.parametrize("file", files("mustafar_jax"), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_core_needs_no_model(file):
    in_cli = file.is_relative_to(PACKAGES["mustafar_jax"] / "cli")
    in_files = file == PACKAGES["mustafar_jax"] / "cache" / "files.py"
    extras = {"rich"} if in_cli else {"safetensors"} if in_files else set()
    for module in imports(file, lazy=not in_cli):
        assert not within(module, "mustafar_jax.models")
        assert not is_third_party(module) or module.split(".")[0] in {"jax", "numpy"} | extras


@pytest.mark.parametrize("file", files("mustafar_jax.models"), ids=lambda file: file.name)
def test_the_models_need_neither_kernels_nor_the_command_line(file):
    for module in imports(file, lazy=True):
        assert not within(module, "mustafar_jax.pallas_kernels")
        assert not within(module, "mustafar_jax.cli")


@pytest.mark.parametrize("file", files("mustafar_jax.quality"), ids=lambda file: file.name)
def test_the_evaluations_take_any_model(file):
    for module in imports(file, lazy=False):
        assert not within(module, "mustafar_jax.models")
        assert not within(module, "mustafar_jax.cli")


def test_importing_the_package_loads_neither_flax_nor_transformers_nor_torch():
    program = """
import sys
import mustafar_jax
heavy = {"flax", "gguf", "rich", "safetensors", "torch", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "mustafar_jax.models" not in sys.modules
assert mustafar_jax.models is sys.modules["mustafar_jax.models"]
assert "flax" in sys.modules
import mustafar_jax.models.tokenizer
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_loading_models_and_tokenizers_loads_no_torch():
    program = """
import sys
sys.modules["torch"] = None  # as where it is not installed: importing it raises
import mustafar_jax.cli
import mustafar_jax.models.gguf
import mustafar_jax.models.tokenizer
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name_is_an_attribute_error():
    package = importlib.import_module("mustafar_jax")
    with pytest.raises(AttributeError, match="module 'mustafar_jax' has no attribute 'nonsense'"):
        _ = package.nonsense


@pytest.mark.parametrize("name", PACKAGES)
def test_what_is_exported_exists_and_is_documented(name):
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", [])
    assert name in ("mustafar_jax.pallas_kernels", "mustafar_jax.quality") or exported
    assert sorted(set(exported)) == sorted(exported)
    for each in exported:
        assert getattr(package, each).__doc__


def test_the_installed_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.metadata.version("mustafar_jax") == project["version"]
    assert importlib.import_module("mustafar_jax").__version__ == project["version"]


def test_a_checkout_that_is_not_installed_can_be_imported():
    program = """
import importlib.metadata
version = importlib.metadata.version
def not_installed(name):
    if name == "mustafar_jax":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = not_installed
import mustafar_jax.models
assert mustafar_jax.__version__ == "0+unknown"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_dir_names_what_there_is_for_users():
    package = importlib.import_module("mustafar_jax")
    assert set(dir(package)) == {*package.__all__, "__version__"}
    assert all(hasattr(package, name) for name in dir(package))


def test_the_readme_begins_with_what_can_be_made():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    first = readme.split("```")[1]
    assert re.findall("^make ([a-z-]+)", first, flags=re.MULTILINE) == ["demo", "test"]
    assert {"demo", "test"} <= set(re.findall("make ([a-z-]+)", readme)) <= set(targets)


def test_the_packages_are_installed_from_their_folders():
    for name, folder in PACKAGES.items():
        file = importlib.import_module(name).__file__
        assert file is not None
        assert (folder / "__init__.py").read_bytes() == pathlib.Path(file).read_bytes()
