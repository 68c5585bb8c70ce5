"""What the programs say where there is no GPU: a line and status 1, before any work."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from benchmarks import generation, gpu
from mustafar_jax.pallas_kernels import cuda
from tests.conftest import has_gpu
from tests.helpers import exhaustive

ROOT = pathlib.Path(__file__).parents[2]
WANTS_GPU = [
    ("attention", ["--shapes", "A", "tiny"]),
    ("compression", []),
    ("generation", []),
    ("generation", ["--bars", "--shapes", "tiny"]),
    ("memcheck", ["--prepare", "launches"]),
    ("memcheck", ["--launch", "launches"]),
    ("rivals", []),
    ("spills", []),
    ("torch_attention", ["[]", "0"]),
    ("tune", []),
]
WANTS_NONE = {"scaling", "agreement", "bars", "likelihood", "quality_report", "quality_sweep", "stacked", "turns"}


def test_every_program_is_known_to_want_one_or_not():
    found = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "def main(" in file.read_text()}
    assert found == {name for name, _ in WANTS_GPU} | WANTS_NONE


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        *(case for case in WANTS_GPU if case[0] != "generation"),
        *exhaustive(*(case for case in WANTS_GPU if case[0] == "generation")),  # asks in a process of its own, as below
    ],
)
def test_programs_end_with_a_line_where_there_is_no_gpu(program, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{program}").main(arguments)
    assert isinstance(ended.value.code, str)  # printed on stderr, and status 1
    assert ended.value.code.startswith(gpu.no_gpu(program))
    assert "\n" not in ended.value.code
    assert capsys.readouterr().out == ""
    assert [*tmp_path.iterdir()] == []
    assert not (ROOT / "benchmarks" / "results" / "cpu").exists()


@pytest.mark.exhaustive
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_the_line_is_all_that_is_printed():
    command = [sys.executable, "-m", "benchmarks.generation"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    line = gpu.no_gpu("generation", generation.TRIAL)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"{line}\n")


def test_largest_batches_want_a_device_that_tells_its_memory(tmp_path):
    if has_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--batches largest: this device does not say how much memory it has"):
        generation.main(["--shapes", "tiny", "--output", str(tmp_path)])


def test_another_capability_is_not_enough(monkeypatch):
    monkeypatch.setattr(cuda, "compute_capability", lambda: 8.0)
    gpu.require_gpu("tune")
    gpu.require_gpu("tune", capability=8.0)
    with pytest.raises(SystemExit, match=r"benchmarks.spills needs a GPU of compute capability 9.0; this one has 8.0"):
        gpu.require_gpu("spills", capability=9.0)
