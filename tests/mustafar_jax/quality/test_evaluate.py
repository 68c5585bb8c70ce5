"""Evaluations on a tiny model of random weights: what is scored, what is kept, and how a run goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import mustafar_jax as mj
from mustafar_jax.generation import DENSE
from mustafar_jax.models import Llama, ModelConfig
from mustafar_jax.quality.evaluate import TOKENS, Evaluator, cache_bytes, summarise
from mustafar_jax.quality.examples import Example
from mustafar_jax.quality.forcing import compare, hidden_states
from mustafar_jax.quality.quantised import Quantised, quantise
from mustafar_jax.quality.runs import Run
from tests.helpers import exhaustive

VOCABULARY, HEAD_DIM = 96, 32
PUBLISHED = mj.CompressionConfig(0.7, 0.7)


def make_model(layers):
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda leaf: leaf * 4, state))  # far from uniform predictions
    return model


@pytest.fixture(scope="module")
def model():
    """Of one layer, since each is compiled."""
    return make_model(1)


@pytest.fixture(scope="module")
def two_layers():
    return make_model(2)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape, dtype=np.int32)


def forced(count=3, prompt=100, gold=40):
    rows = tokens(count, prompt + gold)
    return [
        Example(f"e{i}", row[:prompt], "ab"[i % 2], gold=row[prompt:], info={"depth": i}) for i, row in enumerate(rows)
    ]


@pytest.mark.exhaustive
def test_losses_are_those_of_token_by_token_decoding(model):
    text, kind = tokens(2, 140), mj.CompressionConfig.recommended(0.5, 0.7)
    args = text[:, :100], np.array([100, 100]), text[:, 100:]
    dense, hidden = hidden_states(model, [DENSE, kind], *args)
    [scores, same] = compare(model, dense, [hidden, dense], args[2])
    expected = [mj.log_likelihoods(model, text, prompt_length=100, config=each) for each in (kind, DENSE)]
    np.testing.assert_allclose(-scores.loss, expected[0], atol=2e-4)
    np.testing.assert_allclose(-scores.dense_loss, expected[1], atol=2e-4)
    assert (np.asarray(scores.kl) > -1e-6).all()
    assert scores.kl.mean() > 1e-3
    np.testing.assert_allclose(same.kl, 0, atol=1e-6)


def test_divergence_and_the_likeliest_token(two_layers):
    """Against softmaxes in numpy."""
    rng = np.random.default_rng(1)
    dense, other = (jnp.asarray(rng.standard_normal((1, 3, 64)), jnp.float32) for _ in range(2))
    other = other.at[0, 0].set(dense[0, 0] + 0.1 * other[0, 0])
    target = tokens(1, 3)
    [scores] = compare(two_layers, dense, [other], target)
    p, q = (np.asarray(jax.nn.softmax(two_layers.logits(hidden)), np.float64) for hidden in (dense, other))
    np.testing.assert_allclose(scores.kl, (p * np.log(p / q)).sum(axis=-1), rtol=1e-3)
    np.testing.assert_array_equal(scores.best, q.argmax(axis=-1) == target)
    # the first token of both is one that both think likeliest, or neither
    np.testing.assert_array_equal(scores.agrees, q.argmax(axis=-1) == p.argmax(axis=-1))
    assert scores.agrees.tolist() == [[True, False, False]]


@pytest.mark.exhaustive
def test_prompts_of_different_lengths_are_scored_as_alone(model):
    text, gold, other = tokens(2, 100), tokens(2, 40, seed=2), tokens(2, 100, seed=3)
    [both] = hidden_states(model, [PUBLISHED], text, np.array([100, 77]), gold)
    other[0, :77] = text[1, :77]  # in another row, beside another prompt, before other padding
    [moved] = hidden_states(model, [PUBLISHED], other, np.array([77, 90]), gold[::-1])
    np.testing.assert_allclose(both[1], moved[0], atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("given", [False, *exhaustive(True)])
def test_values_that_do_not_fit_are_an_error_that_names_the_examples(model, tokenizer, tmp_path, given):
    config = mj.CompressionConfig(0, 0.5, v_method="channel_magnitude", v_slots=8, residual_length=0)
    after = {"gold": tokens(3)} if given else {"max_new_tokens": 1, "score": len}
    examples = [Example("long", tokens(40), **after), Example("short", tokens(20), **after)]
    with pytest.raises(ValueError, match=r"needs more entries than its slots hold, in rows \['long'\]"):
        Evaluator(model, tokenizer, padding=40).run(config, examples, Run(tmp_path, {}))


def test_records_metrics_and_resuming(two_layers, tokenizer, tmp_path):
    examples, reports = forced(), []
    evaluator = Evaluator(two_layers, tokenizer, batch=2, padding=100)
    evaluator.run(PUBLISHED, examples[:1], Run(tmp_path, {"task": "x"}))
    run = Run(tmp_path, {"task": "x"})
    first = json.loads(json.dumps(run.records[0]))
    run.records[0]["scores"]["loss"] = -1.0  # what has a record is not evaluated again
    evaluator.run(PUBLISHED, examples, run, lambda *report: reports.append(report))
    assert [record["id"] for record in run.records] == ["e0", "e1", "e2"]
    assert run.records[0]["scores"]["loss"] == -1.0
    # both in one batch, whose layers are parts of the work
    assert reports == [(1, 3), (2, 3), (3, 3), (3, 3)]
    assert [record["depth"] for record in run.records] == [0, 1, 2]
    again = Run(tmp_path, {"task": "x"})
    assert again.records[0] == first
    metrics = summarise(again.records)
    assert sorted(metrics) == ["a", "all", "b"]
    assert metrics["a"]["loss"]["n"] == 2
    losses = [record["scores"]["loss"] for record in again.records]
    mean = np.mean([np.mean(losses[0::2]), losses[1]])  # of the groups' means
    assert metrics["all"]["loss"]["mean"] == pytest.approx(mean)
    assert metrics["all"]["loss"]["n"] == 3
    for record in again.records:
        scores = record["scores"]
        assert scores["loss"] - scores["dense_loss"] == pytest.approx(scores["increase"], abs=1e-5)
        assert 0 < scores["agreement"] < 1
    shown = summarise(again.records, TOKENS)["all"]
    assert list(shown) == list(TOKENS)
    assert shown["perplexity"]["mean"] == pytest.approx(np.exp(mean))
    assert shown["perplexity"] == {
        name: number if name == "n" else pytest.approx(np.exp(number)) for name, number in shown["loss"].items()
    }
    del again.records[0]["scores"]["agreement"]  # as an earlier version wrote it
    assert list(summarise(again.records, TOKENS)["all"]) == [name for name in TOKENS if name != "agreement"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("placed", [True, False])
def test_within_a_mesh_the_records_are_the_same(model, tokenizer, tmp_path, kind, placed):
    """Of a model that lies on the mesh's own axes, too."""
    mesh = jax.make_mesh((1,), ("model",), axis_types=(kind,))
    spread = jax.device_put(model, NamedSharding(mesh, PartitionSpec())) if placed else model
    examples = [*forced(2), Example("written", tokens(90), max_new_tokens=3, score=len)]
    found, wanted = Run(tmp_path / "found", {}), Run(tmp_path / "wanted", {})
    Evaluator(model, tokenizer, batch=2, padding=100).run(PUBLISHED, examples, wanted)
    with jax.set_mesh(mesh):
        Evaluator(spread, tokenizer, batch=2, padding=100).run(PUBLISHED, examples, found)
    assert [record["id"] for record in found.records] == [record["id"] for record in wanted.records]
    for record, same in zip(found.records, wanted.records, strict=True):
        assert record["scores"] == pytest.approx(same["scores"], abs=1e-5)
        assert record.get("prediction") == same.get("prediction")


@pytest.mark.exhaustive
def test_kinds_together_are_scored_as_alone(model, tokenizer, tmp_path):
    examples, kinds = forced(), {"dense": DENSE, "published": PUBLISHED, "int4": Quantised(bits=4)}
    evaluator = Evaluator(model, tokenizer, batch=2, padding=100)
    runs = {name: Run(tmp_path / name, {}) for name in kinds}
    evaluator.run(kinds["int4"], examples[1:2], runs["int4"])
    runs["int4"].records[0]["scores"]["loss"] = -1.0  # what has a record is not evaluated again
    evaluator.run_together([(kinds[name], runs[name]) for name in kinds], examples)
    assert runs["int4"].records[0]["scores"]["loss"] == -1.0
    for name, kind in kinds.items():
        alone = Run(tmp_path / f"{name} alone", {})
        evaluator.run(kind, examples, alone)
        expected, found = ({r["id"]: r["scores"] for r in run.records} for run in (alone, runs[name]))
        assert len(runs[name].records) == len(found) == 3
        for id_ in found.keys() - ({"e1"} if name == "int4" else set()):
            assert found[id_] == pytest.approx(expected[id_], abs=1e-5)


def test_a_record_that_was_cut_short_is_made_again(tmp_path):
    run = Run(tmp_path, {})
    run.add([{"id": "a\u2028"}, {"id": "b"}])
    with open(tmp_path / "records.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "c')
    again = Run(tmp_path, {})
    assert again.missing(["a\u2028", "b", "c"]) == {"c"}
    again.add([{"id": "c"}])
    assert [record["id"] for record in Run(tmp_path, {}).records] == ["a\u2028", "b", "c"]


def test_a_folder_of_another_run_is_refused(tmp_path):
    Run(tmp_path, {"batch": 7})
    Run(tmp_path, {"batch": 1, "config": {"k": (0.5, 1)}}).add([{"id": "a"}])  # there was nothing of the other yet
    Run(tmp_path, {"batch": 1, "config": {"k": (0.5, 1)}})
    with pytest.raises(ValueError, match=r"settings.json is of a run with other settings \(batch: 1, now 2\)"):
        Run(tmp_path, {"batch": 2, "config": {"k": (0.5, 1)}})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nothing", "is no record: Expecting value"),
        (b"\xff", "is no record: 'utf-8' codec"),
        (b"[1]", "is no record: a JSON list; wanted an object"),
        (b'{"scores": {}, "group": ""}', r"is no record: it has no id, only \['group', 'scores'\]"),
    ],
)
def test_a_broken_record_is_named(tmp_path, line, message):
    (tmp_path / "records.jsonl").write_bytes(b'{"id": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"records\.jsonl:2 {message}"):
        Run(tmp_path, {})


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_broken_settings_are_named(tmp_path, text):
    Run(tmp_path, {}).add([{"id": "a"}])
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json is no settings: "):
        Run(tmp_path, {})


def test_what_is_not_finite_is_never_written(tmp_path):
    run = Run(tmp_path, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.add([{"id": "a", "scores": {"loss": float("nan")}}])
    run.finish({"perplexity": [float("inf"), 2.0]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"perplexity": [None, 2.0]}
    (tmp_path / "records.jsonl").write_text('{"id": "a", "scores": {"loss": NaN}}\n')
    with pytest.raises(ValueError, match=r"records.jsonl:1 is no record: NaN is no number of JSON's"):
        Run(tmp_path, {})


def test_ids_must_be_different(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"examples have ids \['e1'\] more than once"):
        Evaluator(model, tokenizer).run(PUBLISHED, [*forced(), *forced()[1:2]], Run(tmp_path, {}))


def test_written_answers(model, tokenizer, tmp_path):
    prompts = tokens(2, 40)
    examples = [
        Example(
            f"e{i}", row, max_new_tokens=5, score=lambda text: float(len(text.split()) == 5), info={"answers": ["x"]}
        )
        for i, row in enumerate(prompts)
    ]
    run = Run(tmp_path, {})
    Evaluator(model, tokenizer, batch=2, padding=8).run(PUBLISHED, examples, run)
    expected = mj.generate(model, prompts, max_new_tokens=5, config=PUBLISHED).tokens
    assert [record["prediction"] for record in run.records] == [tokenizer.decode(row) for row in np.asarray(expected)]
    assert [record["scores"] for record in run.records] == [{"score": 1.0}] * 2
    assert json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])["answers"] == ["x"]


def test_answers_without_finite_logits_are_left_out(model, tokenizer, tmp_path):
    broken = nnx.clone(model)
    broken.embed_tokens.embedding[...] = broken.embed_tokens.embedding[...].at[95].set(jnp.nan)
    prompts = np.where(tokens(3, 30) == 95, 0, tokens(3, 30))
    prompts[1, 7] = 95
    examples = [Example(f"e{i}", row, max_new_tokens=5, score=lambda text: 1.0) for i, row in enumerate(prompts)]
    run = Run(tmp_path, {})
    problems = Evaluator(broken, tokenizer, padding=8).run(PUBLISHED, examples, run)
    assert list(map(str, problems)) == ["example e1: the model's logits are not finite"]
    assert [record["id"] for record in run.records] == ["e0", "e2"]


@pytest.mark.parametrize("order", [1, *exhaustive(-1)])
def test_every_example_stops_by_its_own_tokens(model, tokenizer, tmp_path, order):
    prompt = tokens(40)
    free = np.asarray(mj.generate(model, [prompt] * 2, max_new_tokens=5, config=PUBLISHED).tokens[0])
    assert free[1] not in (free[0], *free[2:])
    stop = (int(free[1]),)
    kinds = {"stops": {"stop": stop}, "goes on": {}, "stops late": {"stop": stop, "min_new_tokens": 5}}
    same = {"max_new_tokens": 5, "score": lambda text: float(len(text.split()))}
    # two of each kind, in turn: a batch of the shape that the test above compiled
    examples = [Example(f"{name} {i}", prompt, **same, **how) for i in range(2) for name, how in kinds.items()]
    run = Run(tmp_path, {})
    Evaluator(model, tokenizer, batch=2, padding=8).run(PUBLISHED, examples[::order], run)
    lengths = {record["id"][:-2]: record["scores"]["score"] for record in run.records}
    assert lengths == {"stops": 2, "goes on": 5, "stops late": 5}


def test_a_prompt_beyond_the_context_is_named(model, tokenizer, tmp_path):
    example = Example("far", tokens(510), gold=tokens(7))
    with pytest.raises(ValueError, match="example far: 510 tokens exceed the 505 there is room for"):
        Evaluator(model, tokenizer).run(PUBLISHED, [example], Run(tmp_path, {}))


def test_bytes_at_the_masks_own_count(two_layers):
    config = mj.CompressionConfig(0, 0.7, v_method="channel_magnitude")
    held = cache_bytes(two_layers, config, 1056)
    packed = 1024
    assert held["dense"] == 2 * 2 * 1056 * HEAD_DIM * 2  # of 16 bits, whatever the model is evaluated in
    # All 32 slots of a value have room, of which 10 are filled on average.
    assert held["held"] - held["own_count"] == 2 * packed * (32 - 10) * 2
    paper = cache_bytes(two_layers, PUBLISHED, 1056)
    assert paper["held"] == paper["own_count"]


@pytest.mark.parametrize(("bits", "levels"), [(2, 4), (3, 8), (4, 16)])
def test_quantised_numbers(bits, levels):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)), jnp.float32)
    rounded = np.asarray(quantise(x, bits))
    groups, exact = rounded.reshape(5, 2, 32), np.asarray(x).reshape(5, 2, 32)
    assert max(len(np.unique(group)) for group in groups.reshape(10, 32)) <= levels
    step = (exact.max(axis=-1) - exact.min(axis=-1)) / (levels - 1)
    assert (np.abs(groups - exact).max(axis=-1) <= 0.51 * step + 2e-3).all()
    np.testing.assert_array_equal(quantise(jnp.full((1, 32), 3.0), bits), np.full((1, 32), 3.0))


@pytest.mark.exhaustive
def test_a_quantised_cache_rounds_what_leaves_the_window(model, two_layers):
    config = Quantised(bits=4)
    cache = model.init_cache(config, batch=1, capacity=140)[0]
    key, value = (
        jnp.asarray(np.random.default_rng(i).standard_normal((1, 100, 1, HEAD_DIM)), jnp.float32) for i in (0, 1)
    )
    filled = jax.jit(mj.prefill)(cache, key, value)
    keys, values, _ = filled.to_dense()
    np.testing.assert_array_equal(keys[:, 64:100], key[:, 64:])
    np.testing.assert_array_equal(values[0, :64, 0], quantise(value[0, :64, 0], 4))
    np.testing.assert_array_equal(keys[0, :32, 0], quantise(key[0, :32, 0].T, 4).T)
    # 96 of 140 tokens can be packed: 5 bits a number, beside 64 slots of the ring, lengths and flags.
    assert cache.nbytes == 2 * (96 * HEAD_DIM * 5 // 8 + 64 * HEAD_DIM * 4) + 5
    held = 2 * (2 * (96 * HEAD_DIM * 5 // 8 + 64 * HEAD_DIM * 2) + 5)
    bytes_of = cache_bytes(two_layers, config, 140)
    assert bytes_of["held"] == bytes_of["own_count"] == held


@pytest.mark.exhaustive
def test_a_cache_quantised_to_more_bits_is_closer_to_the_dense_one(model):
    text = tokens(2, 140)  # a batch of the shape that other tests compile
    args = text[:, :100], np.array([100, 100]), text[:, 100:]
    dense, *rounded = hidden_states(model, [DENSE, Quantised(bits=4), Quantised(bits=8)], *args)
    kl = [scores.kl.mean() for scores in compare(model, dense, rounded, args[2])]
    assert kl[1] < kl[0] / 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [mj.CompressionConfig(0, 0, k_bits=8, v_bits=8), *exhaustive(Quantised(bits=8))])
def test_coded_caches_write_answers(config, model, tokenizer, tmp_path):
    """At 8 bits those of a dense cache, but for the last tokens at most."""
    examples = [Example("e", tokens(100), max_new_tokens=6, score=len)]
    texts = []
    for name, each in (("coded", config), ("dense", DENSE)):
        run = Run(tmp_path / name, {})
        Evaluator(model, tokenizer, padding=100).run(each, examples, run)
        texts.append(run.records[0]["prediction"].split())
    assert len(texts[0]) == 6
    assert texts[0][:3] == texts[1][:3]
