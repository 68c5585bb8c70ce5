"""Two processes on one machine, as on two hosts: one process's text; and what one says when the other is killed."""

import os
import socket
import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mustafar_jax import cli
from tests import quick

WORDS = [f"w{index}" for index in range(64)]
ARGUMENTS = ("generate", "--model", "tiny", "--prompt", "w1 w2 w3", "--prompt", "w4 w5", "--preset", "fast")
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags()}


@pytest.fixture
def folder(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=16384, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tiny")
    return tmp_path


def processes(folder, *arguments):
    """The command in two processes that have met."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    hosts = ("--mesh", "data=2", "--coordinator", place, "--num-processes", "2", "--process-id")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mustafar_jax", *ARGUMENTS, *arguments, *hosts, str(number)],
            cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.mark.exhaustive
def test_two_processes_write_the_text_of_one(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main([*ARGUMENTS, "--max-new-tokens", "80"]) == 0
    expected = capsys.readouterr().out
    both = processes(folder, "--max-new-tokens", "80")
    (first, errors), (second, _) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], errors
    assert first.endswith(expected)  # the library of collectives says a line before it
    assert expected not in second


@pytest.mark.exhaustive
def test_when_one_is_killed_the_other_ends_and_says_why(folder):
    staying, killed = processes(folder, "--max-new-tokens", "16000")
    try:
        time.sleep(30)  # both have met, and are at work
        assert staying.poll() is None
        killed.kill()
        _, errors = staying.communicate(timeout=60)
    finally:
        for process in (staying, killed):
            process.kill()
            process.communicate()
    assert staying.returncode != 0
    assert "another task died" in errors or "unhealthy" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "localhost:1"], "--num-processes, --process-id must be given as well"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "--process-id 2 must lie in 0 .. 1"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "1"], "--mesh must say"),
        (["--mesh", "tensor=3"], "mesh data=1,tensor=3,context=1 is of 3 devices; there are 1"),
    ],
)
def test_what_does_not_go_together_is_named_before_any_work(arguments, message, capsys):
    assert cli.main([*ARGUMENTS, *arguments]) == 1
    assert message in capsys.readouterr().err
