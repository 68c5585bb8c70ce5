"""A session of an evaluation from Python: what it checks, where it writes, by what it knows its model."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest
from flax import nnx

from mustafar_jax.config import CompressionConfig
from mustafar_jax.models import Llama, ModelConfig
from mustafar_jax.quality import session
from mustafar_jax.quality.quantised import Quantised
from mustafar_jax.quality.session import Session, folder_name, identity
from mustafar_jax.quality.tasks import TASKS

RECOMMENDED = CompressionConfig.recommended(0.5, 0.5)
SMALL = {"windows": 2, "prompt": 90, "continuation": 8}
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32,
    max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("How much wood would a woodchuck chuck? " * 20)
    return file


@pytest.mark.exhaustive  # the command's test of an evaluation has one in the quick run
def test_a_session_from_python(model, byte_tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = Session("perplexity", RECOMMENDED, data=[str(text)], options=SMALL, limit=1)
    shown: list[tuple[float, int]] = []
    outcome = asked.run(model, byte_tokenizer, source="some/model", progress=lambda *done: shown.append(done))
    assert shown[-1] == (1, 1)
    assert outcome.folder == asked.folder
    assert str(asked.folder) == "results/perplexity/magnitude-0.5_magnitude-0.5"
    assert outcome.nbytes["capacity"] == 98
    assert outcome.metrics["all"]["kl"]["n"] == 1
    assert outcome.problems == []
    settings = json.loads((asked.folder / "settings.json").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["model"] == identity("some/model", CONFIG)
    assert settings["options"] == {"--windows": 2, "--prompt": 90, "--continuation": 8}
    metrics = json.loads((asked.folder / "metrics.json").read_text())
    assert metrics == {"metrics": outcome.metrics, "bytes": outcome.nbytes, "problems": []}
    begun = (asked.folder / "records.jsonl").read_text()
    more = Session("perplexity", RECOMMENDED, data=[text], options=SMALL, folder=asked.folder)
    assert more.run(model, byte_tokenizer, source="some/model").metrics["all"]["kl"]["n"] == 2
    assert (asked.folder / "records.jsonl").read_text().startswith(begun)
    with pytest.raises(ValueError, match="is of a run with other settings \\(model:"):
        more.run(model, byte_tokenizer, source="another/model")


def test_a_session_tells_of_bad_lines_before_the_work(model, byte_tokenizer, tmp_path, monkeypatch):
    row = {"context": "It is so.", "question": "Is it?", "choices": ["yes", "no"], "answer": 0}
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps(row) + "\n{}\n")
    told = []

    def evaluator(*_, **__):
        assert told == ["exam.jsonl:2"]
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "Evaluator", evaluator)
    asked = Session("choice", RECOMMENDED, data=[file], folder=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        asked.run(
            model,
            byte_tokenizer,
            source="x",
            warn=lambda problem: told.append(str(problem).split(": ")[0].removeprefix(f"{tmp_path}/")),
        )


@pytest.mark.exhaustive
def test_examples_without_finite_logits_are_named_and_left_out(byte_tokenizer, tmp_path):
    """A model for which one byte, in the second line's document alone, is NaN."""
    model = Llama(CONFIG, dtype=jnp.float16, rngs=nnx.Rngs(0))
    byte = byte_tokenizer.convert_tokens_to_ids("!")
    model.embed_tokens.embedding[...] = model.embed_tokens.embedding[...].at[byte].set(jnp.nan)
    row = {"context": "It is so.", "question": "Is it?", "choices": ["yes", "no"], "answer": 0}
    file, told = tmp_path / "exam.jsonl", []
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, row | {"context": "It is so!"})))
    asked = Session("choice", RECOMMENDED, data=[file], folder=tmp_path / "out")
    outcome = asked.run(model, byte_tokenizer, source="x", warn=lambda problem: told.append(str(problem)))
    what = "the model's logits are not finite; float16 holds no number beyond 65504: try bfloat16"
    assert sorted(told) == [f"example exam:2:{choice}: {what}" for choice in (0, 1)]
    assert sorted(map(str, outcome.problems)) == sorted(told)
    assert outcome.metrics["all"]["accuracy"]["n"] == 1
    names = [json.loads(line)["id"] for line in (asked.folder / "records.jsonl").read_text().splitlines()]
    assert sorted(names) == ["exam:1:0", "exam:1:1"]
    file.write_text(2 * (json.dumps(row | {"context": "It is so!"}) + "\n"))  # of a shape that is compiled
    nothing = Session("choice", RECOMMENDED, data=[file], folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"no example could be evaluated; example exam:[12]:[01]: the model"):
        nothing.run(model, byte_tokenizer, source="x")


@pytest.mark.parametrize(
    ("task", "options", "error", "message"),
    [
        ("perplexity", {"data": []}, ValueError, "data is missing: perplexity needs text files"),
        ("perplexity", {"data": ["nowhere.txt"]}, ValueError, "data names nowhere.txt, which is no file"),
        ("perplexity", {"data": ["a/x.txt", "b/x.txt"]}, ValueError, "data names a/x.txt and b/x.txt: examples go by"),
        ("perplexity", {"options": {"window": 2}}, TypeError, r"options names \['window'\]; wanted names out of \['c"),
        ("longbench", {"options": {}}, ValueError, "options has no 'prompts': LongBench's config/dataset2prompt.json"),
        ("perplexity", {"limit": 0}, ValueError, "limit=0 must be at least 1, or None"),
        ("perplexities", {}, ValueError, "task='perplexities' must be one of"),
    ],
)
def test_a_session_checks_what_it_is_given(task, options, error, message):
    with pytest.raises(error, match=message):
        Session(task, RECOMMENDED, **options)


@pytest.mark.parametrize("name", TASKS)
def test_the_flags_of_a_task_are_its_options(name):
    task = TASKS[name]
    required = {"prompts": "x"} if name == "longbench" else {}
    complete = task.complete(required)
    assert list(task.settings(complete)) == list(task.options)
    assert complete | required == complete


def test_a_model_is_known_by_its_path_and_its_description(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    here = identity("tiny", CONFIG)
    assert here == identity(str(tmp_path / "tiny"), CONFIG)
    assert here["source"] == str(tmp_path / "tiny")
    changed = identity("tiny", dataclasses.replace(CONFIG, rope_theta=5.0))
    assert changed["source"] == here["source"]
    assert changed["fingerprint"] != here["fingerprint"]
    assert identity("some/model", CONFIG) == here | {"source": "some/model"}


def test_folders_are_named_after_what_they_hold():
    names = {
        **{name: CompressionConfig.preset(name) for name in ("fast", "balanced", "small")},
        "magnitude-0.7_magnitude-0.7": CompressionConfig.recommended(),
        "magnitude-0.7_channel_magnitude-0.7": CompressionConfig.recommended(v_method="channel_magnitude"),
        "2-4-0.5_magnitude-0": CompressionConfig.recommended(0.5, 0, k_method="2:4"),
        "magnitude-0.7_magnitude-0.7_sink_tokens=0_center_keys=False_weigh_keys=False_rescale_values=False": (
            CompressionConfig()
        ),
        "magnitude-0.7_magnitude-0.7_residual_length=8_group=64": CompressionConfig.recommended(
            residual_length=8, group=64
        ),
    }
    assert {folder_name(config): config for config in names.values()} == names


def test_every_field_of_the_config_shows_in_a_folder_s_name(monkeypatch):
    """So that caches of two configs never share a folder."""
    monkeypatch.setattr(CompressionConfig, "__post_init__", lambda config: None)  # any values will do
    config = CompressionConfig.recommended()
    names = {folder_name(config)}
    fields = dataclasses.fields(config)
    for field in fields:
        value = getattr(config, field.name)
        other = not value if isinstance(value, bool) else "think" if isinstance(value, str) else (value or 1) * 2
        names.add(folder_name(dataclasses.replace(config, **{field.name: other})))
    assert len(names) == 1 + len(fields)


def test_a_field_that_is_new_comes_last_in_a_folder_s_name(monkeypatch):
    monkeypatch.setattr(session, "_ORDER", ("weigh_keys",))
    config = CompressionConfig.recommended(group=64, weigh_keys=False, residual_length=8)
    assert folder_name(config) == "magnitude-0.7_magnitude-0.7_weigh_keys=False_residual_length=8_group=64"


def test_simulated_neighbours_have_folders_of_their_own():
    names = [folder_name(Quantised(bits=bits)) for bits in (2, 4)] + [folder_name(CompressionConfig(0, 0))]
    assert len(set(names)) == 3
    assert "bits=4" in names[1]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("bits=0 must be an integer in 1 .. 8", {"bits": 0}),
        ("bits='x' must be an integer in 1 .. 8", {"bits": "x"}),
        ("k_sparsity=0.5 must be 0: `bits` says what is rounded", {"k_sparsity": 0.5}),
        ("k_bits=8 must be 16: `bits` says what is rounded", {"k_bits": 8}),
    ],
)
def test_simulated_codes_that_there_are_not_are_refused(message, fields):
    with pytest.raises(ValueError, match=re.escape(message)):
        Quantised(**fields)
