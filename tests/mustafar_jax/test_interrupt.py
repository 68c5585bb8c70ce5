"""Ctrl-C at several moments of a command: it ends at once, with status 130, and what it has done is kept."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers import exhaustive

WORDS = [f"w{index}" for index in range(64)]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    "PYTHONUNBUFFERED": "1",
    "JAX_PLATFORMS": "cpu",
}
AT_ONCE = 5.0
"""Seconds; on an idle machine it takes a half at most, and a program's compilation lasts longer."""


@pytest.fixture(scope="module", autouse=True)
def _interrupts_are_not_ignored() -> Iterator[None]:
    """A shell has its background jobs ignore them, and what these start does as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model `tiny`, whose decode step takes some seconds to compile, and `flat`, of one layer."""
    folder = tmp_path_factory.mktemp("interrupt")
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}w9"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    for name, layers in (("tiny", 12), ("flat", 1)):
        config.num_hidden_layers = layers
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(" ".join(WORDS[i % 61] for i in range(20000)))
    return folder


@contextlib.contextmanager
def started(folder, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which tells on stderr what it compiles."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mustafar_jax.cli", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, "JAX_LOG_COMPILES": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupt(process: "subprocess.Popen[Any]") -> tuple[int, float]:
    """The exit status after one Ctrl-C, and how many seconds it took."""
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=60), time.perf_counter() - start


def wait_for(stream, text: str) -> None:
    """Read until a line holds the text; whatever follows is read, too, so that the process can write it."""
    for line in stream:
        if text in line:
            break
    else:
        raise AssertionError(f"it ended without {text!r}")
    threading.Thread(target=stream.read, daemon=True).start()


GENERATE = ["generate", "--model", "tiny", "--prompt", "w1 w2 w3", "--max-new-tokens", "8000", "--stream"]
BENCH = ["bench", "--model", "tiny", "--context", "100", "--new-tokens", "4000"]
EVAL = ["eval", "perplexity", "--model", "tiny", "--data", "text.txt", "--prompt", "100", "--continuation", "200"]
EVAL += ["--windows", "60", "--batch", "1"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        (GENERATE, "Compiling jit(_stream_step)"),
        *exhaustive(
            (GENERATE, "Compiling jit(_prefill_rows)"),
            (GENERATE, "Finished XLA compilation of jit(_stream_step)"),
            (BENCH, "Compiling jit(_stream_step)"),
            (BENCH, "Finished XLA compilation of jit(_stream_step)"),
            (EVAL, "Compiling jit(_extend)"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_one_interrupt_ends_it_at_once(folder, tmp_path, arguments, moment):
    with started(folder, *arguments, *(["--output", str(tmp_path)] if arguments is EVAL else [])) as process:
        wait_for(process.stderr, moment)
        time.sleep(0.3)
        status, seconds = interrupt(process)
    assert status == 130
    assert seconds < AT_ONCE


@pytest.mark.exhaustive
def test_in_a_chat_it_ends_the_answer_and_the_conversation_goes_on(folder):
    arguments = ["chat", "--model", "flat", "--max-new-tokens", "3000", "--preset", "dense"]
    with started(folder, *arguments) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        threading.Thread(target=process.stderr.read, daemon=True).start()
        process.stdin.write("w1 w2\n")
        process.stdin.flush()
        assert process.stdout.read(1) == "w"  # the answer begins
        process.send_signal(signal.SIGINT)
        first = process.stdout.readline()
        assert process.poll() is None
        process.stdin.write("w3\n")
        process.stdin.flush()
        assert process.stdout.read(1) == "w"
        process.send_signal(signal.SIGINT)
        second = process.stdout.readline()
        start = time.perf_counter()
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        assert time.perf_counter() - start < AT_ONCE
        process.stdin = None
    assert 0 < len(first.split()) < 3000
    assert 0 < len(second.split()) < 3000


@pytest.mark.exhaustive
def test_records_are_kept_and_an_evaluation_goes_on(folder, tmp_path):
    output = ["--output", str(tmp_path)]
    with started(folder, *EVAL, *output) as process:
        threading.Thread(target=process.stderr.read, daemon=True).start()
        records = tmp_path / "records.jsonl"
        while process.poll() is None and not (records.exists() and records.read_text().count("\n") > 2):
            time.sleep(0.05)
        status, seconds = interrupt(process)
    assert status == 130
    assert seconds < AT_ONCE
    kept = records.read_text()
    names = [json.loads(line)["id"] for line in kept.splitlines()]
    assert 2 < len(names) == len(set(names)) < 60
    more = [sys.executable, "-m", "mustafar_jax.cli", *EVAL, *output]
    subprocess.run(more, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    assert records.read_text().startswith(kept)
    assert len(records.read_text().splitlines()) == 60


def test_the_terminal_gets_its_cursor_back(folder):
    master, slave = os.openpty()
    command = [sys.executable, "-m", "mustafar_jax.cli", *BENCH]
    terminal = {**ENVIRONMENT, "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=folder, env=terminal, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    shown = b""
    while b"\x1b[?25l" not in shown:  # a bar hides it
        shown += os.read(master, 1024)
    assert interrupt(process)[0] == 130
    with contextlib.suppress(OSError):  # of a terminal that nobody else holds any more
        while more := os.read(master, 1024):
            shown += more
    os.close(master)
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
