"""What all tests share."""

import os
import pathlib
from collections.abc import Iterator

from tests.quick import QUICK

# Before jax is imported; not where there is a GPU, whose programs would run too slowly.
if not any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
    flags = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

import hypothesis
import jax
import pytest

# Examples are the same in every run, so that a change is judged on what it changes; to look for new ones:
# pytest --hypothesis-profile=explore. There is no deadline, since the first example of a shape compiles.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")


def has_gpu() -> bool:
    """Whether jax can use a GPU here."""
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU that jax can use"))


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_file() -> Iterator[None]:
    """A process may have so many memory maps (vm.max_map_count), of which each compiled program takes several."""
    yield
    jax.clear_caches()
