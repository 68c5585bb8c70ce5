import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mustafar_jax as mj
from benchmarks import device_time, generation, generation_cases, generation_measure, generation_plots
from benchmarks.attention_cases import RULES
from benchmarks.generation_cases import Case
from benchmarks.table import Table
from mustafar_jax.generation import decode_step, prefill_prompt
from mustafar_jax.models import memory
from tests.helpers import exhaustive

TINY = Case("tiny", 40, 0.7, 3, "xla", new_tokens=128)
SIZES = ["--shapes", "tiny", "--contexts", "40", "--batches", "3", "--new-tokens", "128"]
LLAMA = Case("llama-3-8b", 16384, 0.7, 8, "triton")
GB = 10**9


def row_of(case, **fields):
    parts = {"limit_bytes": 80 * GB, "attention_ms": 5.0, "compression_ms": 0.5, "rest_ms": 4.0}
    return dataclasses.asdict(case) | {"status": "ok", "ttft_s": 2.0, "step_ms": 10.0} | parts | fields


def options(*arguments):
    return generation._parser().parse_args(arguments)


def test_a_case_is_measured_as_planned():
    row = generation_measure.run_here(TINY, generation_measure.measure)
    assert row["status"] == "ok", row["reason"]
    plan = TINY.plan
    assert (row["weights_bytes"], row["cache_bytes"]) == (plan.weights, plan.caches)
    assert row["ttft_s"] > 0
    assert row["tokens_per_s"] == pytest.approx(3 / row["step_ms"] * 1e3)
    assert len(row["steps_ms"]) == 1
    assert row["flatness"] is None
    assert generation_measure.run_here(TINY, generation_measure.complete) == {"status": "ok"}
    assert min(row["steps_ms"]) <= row["step_ms"] <= max(row["steps_ms"])
    json.dumps(row)


def test_what_cannot_run_is_noted_with_its_reason():
    row = generation_measure.run_here(
        dataclasses.replace(TINY, sparsity=0.0, implementation="triton"), generation_measure.measure
    )
    assert row["status"] == "failed"
    assert row["reason"].startswith("NotImplementedError: no implementation can attend dense caches here: triton: ")


@pytest.mark.exhaustive
def test_a_run_replaces_its_own_earlier_row_and_keeps_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # a GPU's memory is this process's
    dense = dataclasses.replace(TINY, sparsity=0.0)
    there = {"tokens_per_s": 1.0, "where": {"device": "cpu", "commit": "another"}}
    earlier = [row_of(case, **there) for case in (dense, TINY, dataclasses.replace(TINY, batch=2))]
    (tmp_path / "generation.json").write_text(json.dumps({"rows": earlier}))
    sizes = [*SIZES, "--sparsities", "0", "--resume"]
    generation.main([*sizes, "--dense-implementation", "xla", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "generation.json").read_text())
    assert written["rows"][:2] == earlier[1:]
    assert generation_cases.case_of(written["rows"][2]) == dense
    assert written["rows"][2]["tokens_per_s"] > 1
    assert written["rows"][2]["where"]["jax"] == jax.__version__
    assert "[1/1] tiny, 40 tokens, batch 3, dense\n" in capsys.readouterr().out


def test_a_process_that_ends_badly_or_late_is_noted(tmp_path):
    assert generation.Launcher(0.5, 100, str(tmp_path))(["--one", "{}"]) == {
        "status": "failed",
        "reason": "the process ended with status 1",
    }
    assert generation.Launcher(0.5, 0.01, str(tmp_path))(["--describe"])["reason"] == "not finished after 0 s"


def test_the_largest_batches_of_two_devices_are_two_cases(tmp_path):
    largest = dataclasses.replace(LLAMA, largest=True)
    table = Table(tmp_path / "rows.json", generation_cases.identity)
    for batch, limit in ((20, 80 * GB), (50, 140 * GB), (49, 140 * GB)):
        table.add(row_of(dataclasses.replace(largest, batch=batch), limit_bytes=limit, where={"device": "here"}))
    assert [row["batch"] for row in table.rows] == [20, 49]


def test_what_ran_at_this_commit_is_not_run_again_and_the_plan_is_checked(tmp_path, capsys):
    largest = dataclasses.replace(LLAMA, largest=True, batch=40)
    device = {"where": {"device": "here", "commit": "this"}, "limit_bytes": 80 * GB}
    asked = []

    def ask(arguments):
        asked.append((json.loads(arguments[1])["batch"], *arguments[2:]))
        full = {"status": "out of memory", "reason": "full"}
        return full if arguments[2:] else {"status": "ok", "tokens_per_s": 5.0, "ttft_s": 2.0, "step_ms": 10.0}

    cases = [LLAMA, largest]
    generation.run_all(cases, tmp_path, device, ask)
    assert asked == [(8,), (40,)]
    generation.run_all(cases, tmp_path, device, ask, check_plan=True, resume=True)
    assert asked[2:] == [(42, "--complete")]
    [row] = [row for row in json.loads((tmp_path / "generation.json").read_text())["rows"] if row["largest"]]
    assert (row["larger_batch"], row["larger_fits"]) == (42, False)
    brief = dataclasses.replace(LLAMA, split=False)
    generation.run_all([brief], tmp_path, device, ask, resume=True)  # the row that is there tells more
    assert not asked[3:]
    other = device | {"where": {"device": "here", "commit": "other"}}
    for case in (brief, brief, LLAMA, LLAMA):
        generation.run_all([case], tmp_path, other, ask, resume=True)
    assert asked[3:] == [(8,), (8,)]


def test_flatness_is_what_a_straight_line_leaves():
    assert generation_measure.flatness([5.0] * 7) is None
    assert generation_measure.flatness([10 + 0.1 * i for i in range(20)]) < 1e-9
    assert generation_measure.flatness([10.0] * 10 + [12.0] + [10.0] * 9) == pytest.approx(0.19, abs=0.02)


def test_the_cases_of_the_bars_come_in_the_order_of_their_worth():
    cases = list(generation.bar_cases(options("--rule", "published"), 80 * GB))
    assert [(case.context, case.sparsity, case.largest) for case in cases[:4]] == [
        (16384, 0.0, False), (16384, 0.7, False), (16384, 0.5, False), (16384, 0.0, True),
    ]  # fmt: skip
    assert [case.split for case in cases] == [True] * 3 + [False] * 9
    assert (cases[-1].new_tokens, cases[-1].batch) == (4096, 8)
    assert {case.implementation for case in cases} == {"cudnn", None}
    assert {case.compression for case in cases if case.sparsity == 0.7} == {mj.CompressionConfig(0.7, 0.7)}


def test_cases_are_those_asked_for_dense_ones_first():
    given = options(
        "--shapes", "llama-3-8b", "--contexts", "4096", "--batches", "8", "largest", "--sparsities", "0", "0.7"
    )
    cases = list(generation.cases_of(given, 80 * GB))
    assert cases[:2] == [
        Case("llama-3-8b", 4096, 0.0, 8, "cudnn"),
        Case("llama-3-8b", 4096, 0.7, 8, None),
    ]
    assert [case.largest for case in cases] == [False, False, True, True]
    for case in cases[2:]:
        assert case.plan.total <= 80 * GB < dataclasses.replace(case, batch=case.batch + 1).plan.total
    with pytest.raises(ValueError, match="does not say how much memory"):
        list(generation.cases_of(given, None))
    wrongs = [["--batches", "0"], ["--new-tokens", "100"], ["--new-tokens", "64"], ["--chunk", "0"]]
    wrongs += [["--chunk", "8", "--filled"], ["--chunk", "8", "--bars"], ["--filled", "--bars"]]
    for wrong in wrongs:
        with pytest.raises(SystemExit):
            options(*wrong)


def test_presets_are_cases_beside_a_dense_one_and_earlier_rows_have_none():
    given = options("--shapes", "llama-3-8b", "--contexts", "4096", "--batches", "8", "--sparsities", "0")
    given.presets = ["fast", "dense"]
    dense, fast, also_dense = generation.cases_of(given, 80 * GB)
    assert (fast.compression, fast.is_dense) == (mj.CompressionConfig.preset("fast"), False)
    assert (also_dense.is_dense, also_dense.implementation) == (True, "cudnn")
    assert str(fast) == "llama-3-8b, 4,096 tokens, batch 8, fast (best)"
    earlier = row_of(dense, tokens_per_s=500.0)
    del earlier["preset"]
    assert generation_cases.case_of(earlier) == dense
    row = row_of(fast, tokens_per_s=1000.0)
    assert "; 2.00 of dense tokens/s" in generation_plots.describe_row(row, [earlier, row])


def test_a_preset_is_measured():
    row = generation_measure.run_here(
        dataclasses.replace(TINY, sparsity=0.0, preset="fast"), generation_measure.measure
    )
    assert row["status"] == "ok", row["reason"]
    assert row["cache_bytes"] < TINY.plan.caches


FILLED = {
    "dense": {"sparsity": 0.0, "preset": "dense"},
    "recommended": {},
    "queries": {"rule": "output-aware"},
    "small": {"preset": "small"},
}
"""Caches with each kind of rows and statistics."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["recommended", *exhaustive(*(kind for kind in FILLED if kind != "recommended"))])
def test_filled_caches_hold_finite_rows_to_go_on_from(kind, monkeypatch):
    monkeypatch.setitem(RULES, "output-aware", lambda k, v: mj.CompressionConfig(k, v, k_method="output_aware"))
    case = dataclasses.replace(TINY, context=200, filled=True, **FILLED[kind])
    model, tokens = generation_measure._model_and_tokens(case)
    token, [cache] = generation_measure.fill(tokens, case)
    assert token.tolist() == tokens[:, -1].tolist()
    assert cache.lengths.tolist() == [200] * 3
    assert not cache.overflow.any()
    [empty] = jax.eval_shape(lambda: model.init_cache(case.compression, batch=3, capacity=case.capacity))
    assert jax.tree.structure(cache) == jax.tree.structure(empty)
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(each)] for each in (cache, empty)]
    assert kinds[0] == kinds[1]
    for held in cache.to_dense()[:2]:
        assert np.isfinite(held).all()
        assert (held[:, :200] != 0).any(axis=(2, 3)).all()
        assert (held[0] != held[1]).any()
    packed = None if case.is_dense else cache.packed_lengths.tolist()
    step = jax.jit(decode_step)
    for _ in range(33):  # every sequence packs a group
        logits, [cache] = step(model, token, (cache,))
        assert np.isfinite(logits).all()
    assert cache.lengths.tolist() == [233] * 3
    assert not cache.overflow.any()
    assert case.is_dense or cache.packed_lengths.tolist() == [n + 32 for n in packed]
    assert all(np.isfinite(x).all() for x in cache.to_dense()[:2])


@pytest.mark.exhaustive
def test_a_filled_case_is_one_of_its_own_without_a_first_token():
    case = dataclasses.replace(TINY, filled=True)
    assert case.plan == TINY.plan
    assert str(case) == "tiny, 40 tokens, batch 3, recommended 0.7, filled (xla)"
    assert str(dataclasses.replace(case, sparsity=0.0)) == "tiny, 40 tokens, batch 3, dense, filled"
    row = generation_measure.run_here(case, generation_measure.measure)
    assert row["status"] == "ok", row["reason"]
    assert not {"ttft_s", "ttft_from"} & row.keys()
    assert row["cache_bytes"] == case.plan.caches
    assert generation_measure.run_here(case, generation_measure.complete) == {"status": "ok"}
    row = dataclasses.asdict(case) | row | {"limit_bytes": None, "tokens_per_s": 20.0}
    assert generation_cases.identity(row) != generation_cases.identity(row | {"filled": False})
    slower = row | {"sparsity": 0.0, "tokens_per_s": 10.0}
    others = [slower | {"filled": False, "tokens_per_s": 1.0, "ttft_s": 1.0}]
    assert generation_plots.describe_row(row, [slower, *others]).endswith("; 2.00 of dense tokens/s")
    assert "of dense" not in generation_plots.describe_row(row, others)
    [asked] = generation.cases_of(options(*SIZES, "--sparsities", "0.7", "--filled"), None)
    assert asked == dataclasses.replace(case, implementation=None)


@pytest.mark.exhaustive
def test_prompts_are_prefilled_in_chunks(monkeypatch):
    given = []

    def prefill(*arguments, **how):
        given.append(how["chunk"])
        return prefill_prompt(*arguments, **how)

    monkeypatch.setattr(generation_measure, "prefill_prompt", prefill)
    case = dataclasses.replace(TINY, chunk=16)
    row = generation_measure.run_here(case, generation_measure.measure)
    assert row["status"] == "ok", row["reason"]
    assert row["ttft_s"] > 0
    assert set(given) == {16}
    assert str(case) == "tiny, 40 tokens, batch 3, recommended 0.7, chunks of 16 (xla)"
    row = row_of(case)
    assert generation_cases.case_of(row) == case
    assert generation_cases.identity(row) != generation_cases.identity(row_of(TINY))
    [asked] = generation.cases_of(options(*SIZES, "--sparsities", "0.7", "--chunk", "16"), None)
    assert asked == dataclasses.replace(case, implementation=None)


def test_what_is_known_not_to_fit_is_not_run():
    case = dataclasses.replace(LLAMA, batch=500)
    row = generation.run_one(case, 80 * GB, lambda arguments: pytest.fail(f"{arguments} was run"))
    assert row["status"] == "does not fit"
    assert row["reason"] == f"the memory plan: {case.plan.total / GB:.1f} GB of 80.0 GB"


def test_the_largest_batch_shrinks_until_it_fits():
    tried = []

    def ask(arguments):
        tried.append(json.loads(arguments[1])["batch"])
        return {"status": "ok"} if tried[-1] < 127 else {"status": "out of memory", "reason": "full"}

    case = dataclasses.replace(LLAMA, batch=129)
    row = generation.run_one(dataclasses.replace(case, largest=True), None, ask)
    assert tried == [129, 127, 126]
    assert (row["status"], row["batch"], row["planned_batch"]) == ("ok", 126, 129)
    assert row["planned_bytes"] == case.plan.total
    tried.clear()
    assert generation.run_one(case, None, ask)["status"] == "out of memory"
    assert tried == [129]


def test_a_row_is_described_beside_its_dense_one():
    dense, packed = dataclasses.replace(LLAMA, sparsity=0.0, implementation="cudnn"), LLAMA
    rows = [
        row_of(dense, tokens_per_s=500.0),
        row_of(dataclasses.replace(dense, batch=10, largest=True), tokens_per_s=600.0),
        row_of(packed, tokens_per_s=600.0, ttft_s=2.1),
        row_of(dataclasses.replace(packed, batch=25, largest=True), tokens_per_s=1200.0),
        row_of(packed, status="failed", reason="it rained"),
    ]
    texts = [generation_plots.describe_row(row, rows) for row in rows]
    assert texts[0] == (
        "500.0 tokens/s, first token 2.00 s, step 10.00 ms (attention 5.00, compression 0.50, rest 4.00)"
    )
    assert texts[2].endswith("; 1.20 of dense tokens/s, 1.05 of its time to the first token")
    assert texts[3].endswith("; 2.00 of dense tokens/s, 1.00 of its time to the first token, 2.50 of its batch")
    assert texts[4] == "failed: it rained"


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    held = {"weights_bytes": 16 * GB, "cache_bytes": 5 * GB, "decode_bytes": 22 * GB, "tokens_per_s": 5.0}
    cases = [dataclasses.replace(LLAMA, sparsity=s, batch=b, largest=b == 20) for s in (0.0, 0.7) for b in (1, 8, 20)]
    rows = [row_of(case, **held) for case in cases] + [row_of(LLAMA, status="failed", reason="it rained")]
    rows += [row | {"filled": True} for row in rows]
    generation_plots.plot_speed(rows, tmp_path / "speed.png")
    generation_plots.plot_memory(rows, tmp_path / "memory.png")
    assert {path.name for path in tmp_path.iterdir()} == {"speed.png", "memory.png"}


def test_the_random_model_has_the_planned_weights():
    model = generation_measure.random_model(generation_cases.SHAPES["tiny"])
    leaves = jax.tree.leaves(model)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(generation_cases.DTYPE)}
    assert sum(leaf.size for leaf in leaves) == memory.num_weights(generation_cases.SHAPES["tiny"])
    spreads = {float(leaf.std()) for leaf in leaves if leaf.ndim > 1}
    assert all(0.015 < spread < 0.025 for spread in spreads)


def test_norms_alone_are_ones():
    config = dataclasses.replace(generation_cases.SHAPES["tiny"], attention_bias=True, mlp_bias=True, qk_norm=True)
    layer = generation_measure.random_model(config).layers[0]
    attention = layer.self_attn
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm):
        assert (norm.scale[...] == 1).all()
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        assert 0.01 < linear.bias[...].std() < 0.03


@pytest.mark.exhaustive
def test_qwen_has_the_weights_of_its_checkpoint():
    assert memory.num_weights(generation_cases.SHAPES["qwen2.5-7b"]) == 7_615_616_512


# device_time

HLO = """
%fused (p: f32[2]) -> f32[2] {
  %inner.1 = f32[2]{0} add(%p, %p), metadata={op_name="jit(f)/append/add"}
}
ENTRY %main {
  %p = f32[2]{0} parameter(0), metadata={op_name="x"}
  %fusion.3 = f32[2]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/while/body/append/cond/add" stack_frame_id=4}
  %custom-call = f32[2]{0} custom-call(%fusion.3), metadata={line=3 op_name="jit(f)/decode_attention/append/dot"}
  ROOT %fusion.4 = f32[2]{0} fusion(%custom-call), metadata={op_name="jit(f)/append_not/mul"}
}
"""


def events(*pairs):
    return "".join(
        f"events {{ metadata_id: 1 duration_ps: {duration} stats {{ metadata_id: 1 str_value: '{name}' }} }} "
        for name, duration in pairs
    )


def test_device_time_is_split_by_scope(tmp_path):
    names = "event_metadata { key: 1 value { id: 1 name: 'kernel' } }"
    names += " stat_metadata { key: 1 value { id: 1 name: 'hlo_op' } }"
    first = events(("fusion.3", 5_000_000), ("custom-call", 7_000_000), ("fusion.3", 1_000_000))
    second = events(("fusion.4", 2_000_000), ("unheard-of", 3_000_000))
    space = f"""
    planes {{ name: '/device:GPU:0' {names}
      lines {{ name: 'Stream #14(Compute)' {first} }}
      lines {{ name: 'Stream #15(MemcpyD2D)' {second} events {{ metadata_id: 1 duration_ps: 1000000 }} }}
      lines {{ name: 'XLA Ops' {first} }} }}
    planes {{ name: '/host:CPU' {names} lines {{ name: 'Stream' {first} }} }}
    """
    folder = tmp_path / "plugins" / "profile"
    folder.mkdir(parents=True)
    (folder / "host.xplane.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(space))
    seconds = device_time.split(tmp_path, HLO, ["decode_attention", "append"])
    assert seconds == pytest.approx({"decode_attention": 7e-6, "append": 6e-6, "rest": 6e-6})
    most = device_time.split(tmp_path, HLO, ["append"], total=max)
    assert most == pytest.approx({"append": 12e-6, "rest": 6e-6})
    assert device_time.steady([1.0, 2.0, 9.0]) == 6.0
