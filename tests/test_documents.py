"""What README and docs print, tried: Python runs, and commands are the command line's."""

import pathlib
import re
import shlex

import pytest

from examples import demo
from mustafar_jax import cli, models

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name, language):
    """The code blocks of a document in a language; "" for those without one."""
    found = BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


@pytest.mark.parametrize("name", ["README.md", pytest.param("docs/your_own_model.md", marks=pytest.mark.exhaustive)])
def test_the_cache_in_a_model_of_one_s_own_is_used_as_printed(name, capsys):
    [program] = [text for text in blocks(name, "python") if "LayerCache" in text]
    exec(compile(program, name, "exec"), {})
    printed = float(capsys.readouterr().out.split()[-1])
    assert f"{printed:.2f}" == re.findall(r"# ([\d.]+)", program)[-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["README.md", "docs/text.md"])
def test_text_is_written_as_printed(name, monkeypatch, capsys):
    load = models.load
    monkeypatch.setattr(models, "load", lambda name: load(demo.model_file()))  # no hub is asked
    program = "\n".join(text for text in blocks(name, "python") if "LayerCache" not in text)
    exec(compile(program, name, "exec"), {})
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_those_of_the_command_line(name, capsys):
    lines = [line for text in blocks(name, "") for line in text.splitlines() if line.startswith("mustafar ")]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        try:
            cli.make_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{line}: {capsys.readouterr().err}")
    assert lines or name not in ("README.md", "docs/text.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    text = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), target
