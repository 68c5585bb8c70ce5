"""What all tests share."""

import os
import pathlib
from collections.abc import Iterator

import hypothesis
import jax
import pytest

from tests import quick

# Examples are the same in every run, so that a change is judged on what it changes; to look for new ones:
# pytest --hypothesis-profile=explore. There is no deadline, since the first example of a shape compiles.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.register_profile("exhaustive", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that are this project's own."""
    group = parser.getgroup("mustafar_jax")
    group.addoption("--exhaustive", action="store_true", help="leave out no test, and try more examples of each")
    group.addoption("--optimised", action="store_true", help="compile with all optimisations, as users do")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the compiler's options before anything is compiled, and the examples before a test file reads them."""
    # Where there is a GPU, programs would run too slowly.
    if not config.getoption("optimised") and not any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
        os.environ["XLA_FLAGS"] = f"{quick.flags()} {os.environ.get('XLA_FLAGS', '')}"
    if config.getoption("exhaustive"):
        hypothesis.settings.load_profile("exhaustive")


def has_gpu() -> bool:
    """Whether jax can use a GPU here."""
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `exhaustive` unless asked for, and skip those marked `gpu` where there is none."""
    if not config.getoption("exhaustive"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU that jax can use"))


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file() -> Iterator[None]:
    """A process may have so many memory maps (vm.max_map_count), of which each compiled program takes several."""
    yield
    jax.clear_caches()
