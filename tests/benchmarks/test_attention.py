import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention, attention_plots, synthetic
from benchmarks.attention_cases import SETS, A, Case
from benchmarks.synthetic import MASKS, Shape
from benchmarks.table import Table, attempt
from mustafar_jax.pruning import keep_count

TINY = Shape("tiny", 2, 2, 2, 256, 32)
HERE = {"where": {"device": "here"}}


def options(*arguments):
    return attention._parser().parse_args(["--dense-implementation", "xla", "--shapes", "tiny", *arguments])


@pytest.fixture(scope="module")
def cache():
    config = Case(TINY, "recommended", 0.7, "xla").config
    return lambda mask: synthetic.full_cache(TINY, config, synthetic.scales(mask, TINY))


@pytest.mark.parametrize("mask", MASKS)
def test_random_caches_hold_what_pruned_ones_do(cache, mask):
    rows = cache(mask).keys.packed
    held = rows.mask()
    assert (held.sum(axis=-1) == keep_count(32, 0.7)).all()
    assert rows.slots == keep_count(32, 0.7)
    used = held.any(axis=(0, 2)).sum(axis=-1)  # channels of each head that any row holds
    assert (used == 16).all() if mask in ("half", "words") else (used > 16).all()
    assert (cache(mask).lengths == TINY.tokens).all()
    uneven = float(held.mean(axis=2).std() / held.mean())
    assert (uneven > 0.3) == (mask not in ("random", "sinks"))


def test_rows_are_measured_checked_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "COPY_BYTES", 2**16)
    monkeypatch.setattr(attention, "SWEEP_BYTES", 2**10)
    earlier = {"shape": "other", "name": "x", "us": None, **HERE}
    old = {"shape": "tiny", "name": "old", "us": None}
    (tmp_path / "attention.json").write_text(json.dumps({"rows": [earlier, old]}))
    sizes = ["--shapes", "tiny", "--sparsities", "0.7", "--rules", "published", "--masks", "random", "words"]
    sizes += ["--codes", "4 bits"]
    arguments = [*sizes, "--implementations", "xla", "triton", "--no-torch", "--output", str(tmp_path)]
    attention.main([*arguments, "--dense-implementation", "xla"])
    first, *rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert first == earlier
    names = ["dense, xla", "dense, xla, lengths", "published 0.7, xla", "published 0.7, triton"]
    names += [*(f"{name}, words mask" for name in names[2:]), "4 bits, xla", "4 bits, triton"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["where"]["jax"] == jax.__version__
        if row["implementation"] == "triton":  # it cannot run here, and the others go on
            assert row["us"] is None
            assert row["reason"].startswith("NotImplementedError")
        else:
            assert row["us"] == row["clock_us"] > 0
            assert row["error"] < attention.TOLERANCE
            assert row["limit_us"] > 0
    assert rows[2]["bytes"] < rows[0]["bytes"] == TINY.dense_nbytes + 2 * (4 + 1)
    assert "1.00 of dense, xla" in capsys.readouterr().out


def test_a_wrong_result_shows_no_time():
    case = Case(TINY, "published", 0.7, "xla")
    cache = synthetic.full_cache(TINY, case.config, synthetic.scales("random", TINY))
    query = synthetic.query(TINY)
    wrong = (
        attention.calls_of(lambda *given: 1.01 * case.attend(*given), cache.nbytes, calls=1)
        .lower(query, cache)
        .compile()
    )
    check = attention.reference.lower(query, cache).compile()
    row = attention.check_and_time(wrong, check, query, cache)
    assert row["us"] is None
    assert 0.005 < row["error"] < 0.02


def test_queries_stay_what_they_are_from_call_to_call():
    cache = synthetic.full_cache(TINY, Case(TINY, "dense", 0.0, "xla").config, jnp.ones((2, 2, 32)))
    query = synthetic.query(TINY)
    seen = attention.calls_of(lambda asked, _: asked, cache.nbytes)(query, cache)[0]
    assert abs(seen - query).max() < 0.05
    assert (seen != query).any()


def test_lines_are_grouped_by_their_whole_name():
    def row(rule, implementation, sparsity, name):
        return {"rule": rule, "implementation": implementation, "sparsity": sparsity, "name": name, "tokens": 1}

    rows = [row("dense", "cudnn", 0.0, "dense, cuDNN"), row("dense", "torch flash", 0.0, "dense, torch")]
    rows += [row("published", "triton", sparsity, f"published {sparsity}, triton") for sparsity in (0.7, 0.5)]
    assert {name: len(line) for name, line in attention_plots.lines(rows, "tokens").items()} == dict.fromkeys(
        (row["name"] for row in rows), 1
    )
    by_sparsity = attention_plots.lines(rows, "sparsity")
    assert [row["sparsity"] for row in by_sparsity["published, triton"]] == [0.5, 0.7]
    assert len(by_sparsity) == 3


def test_cases_of_the_shapes_that_are_compared_take_all_sparsities_others_the_largest():
    given = options("--implementations", "triton", "mosaic_gpu", "--rules", "published", "--codes")
    at_a = attention.cases_of(A, given)
    assert [(case.sparsity, case.implementation) for case in at_a[2:]] == [
        (0.5, "triton"), (0.5, "mosaic_gpu"), (0.7, "triton"), (0.7, "mosaic_gpu"),
    ]  # fmt: skip
    assert [case.sparsity for case in attention.cases_of(SETS["batch"][0], given)] == [0, 0, 0.7, 0.7]
    assert attention._masks(at_a[-1], MASKS) == list(MASKS)
    assert attention._masks(at_a[2], MASKS) == ["random"]


def test_a_plot_is_drawn_of_what_has_been_measured(tmp_path):
    pytest.importorskip("matplotlib")
    attention_plots.plot([], tmp_path / "empty.png")
    row = {"rule": "published", "implementation": "triton", "sparsity": 0.7, "name": "x", "us": 5.0, "limit_us": 2.0}
    shapes = [A, SETS["context"][0]]
    rows = [row | shape.describe() | {"mask": "random"} for shape in shapes]
    attention_plots.plot(rows, tmp_path / "some.png")
    measured = {"bytes": 2e6, "copy_bytes_per_s": 4e12}
    attention_plots.plot_roofline([row | measured for row in rows], tmp_path / "roofline.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_row_replaces_its_own_earlier_one(tmp_path):
    path = tmp_path / "rows.json"
    for value in (1, 2):
        table = Table(path, lambda row: row["name"])
        table.add({"name": "a", "value": value, **HERE})
        table.add({"name": "b", "value": value, **HERE})
    assert json.loads(path.read_text()) == {"device": "here", "rows": table.rows}
    assert [(row["name"], row["value"]) for row in table.rows] == [("a", 2), ("b", 2)]
    assert attempt(lambda: 1 / 0) == {"us": None, "reason": "ZeroDivisionError: division by zero"}
