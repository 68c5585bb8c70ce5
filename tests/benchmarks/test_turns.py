import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_time, turns

HELD = 99  # one more token has a group packed
SIZES = ["--held", str(HELD), "--new", "1", "40", "--kv-heads", "1", "--group", "2", "--head-dim", "32"]


@pytest.fixture(scope="module", autouse=True)
def _little_is_swept_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "SWEEP_BYTES", 2**10)
        yield


def turns_of(*arguments):
    return turns.turns_of(turns._parser().parse_args([*SIZES, *arguments]))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "CONFIGS", {name: turns.CONFIGS[name] for name in ("dense", "small")})
        turns.main([*SIZES, "--output", str(folder)])
    return json.loads((folder / "turns.json").read_text())["rows"]


@pytest.mark.exhaustive
def test_a_cache_takes_every_number_of_tokens(rows):
    assert [(row["cache"], row["new"]) for row in rows] == [(name, n) for name in ("dense", "small") for n in (1, 40)]
    for row in rows:
        assert (row["held"], row["capacity"], row["kv_heads"], row["group"]) == (HELD, HELD + 40, 1, 2)
        assert row["where"]["jax"] == jax.__version__
        for part in ("", "again_"):
            assert row[f"{part}us"] == row[f"{part}clock_us"] > 0
            assert row[f"{part}error"] < 5e-3
            assert row[f"{part}temp_bytes"] > 0
        assert row["of_again"] == row["us"] / row["again_us"]


@pytest.mark.exhaustive
def test_times_stand_beside_those_of_dense_caches_at_the_same_number_of_tokens(rows):
    dense = {row["new"]: row for row in rows if row["cache"] == "dense"}
    assert {row["of_dense"] for row in dense.values()} == {1.0}
    for row in rows:
        assert row["of_dense"] == pytest.approx(row["us"] / dense[row["new"]]["us"])


@pytest.mark.exhaustive
def test_every_cache_is_timed(tmp_path, capsys):
    turns.main([*SIZES, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "turns.json").read_text())["rows"]
    assert [(row["cache"], row["new"]) for row in rows] == [(name, new) for name in turns.CONFIGS for new in (1, 40)]
    assert all(row["of_dense"] > 0 and row["of_again"] > 0 for row in rows)
    assert capsys.readouterr().out.count("of reading all again") == len(rows)


def test_times_are_of_the_device_where_the_profiler_sees_one(monkeypatch):
    seconds = iter(1e-6 * us for us in (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 900.0))
    monkeypatch.setattr(
        device_time, "profile", lambda program, *arguments, scopes: (program(*arguments), {"rest": next(seconds)})
    )
    times = turns.time_calls(lambda cache, *tokens: (None, cache), "a cache", ())
    assert (times["us"], times["timed"]) == (pytest.approx(6.0), "profiler")
    assert 0 < times["clock_us"] < 1e5


@pytest.mark.exhaustive
def test_a_call_gives_back_a_cache_as_long_as_before():
    [turn] = [turn for turn in turns_of("--batch", "2") if (turn.cache, turn.new) == ("recommended 0.7", 40)]
    tokens, call = turn.tokens(), jax.jit(turns.attend, donate_argnums=0)
    cache = turn.filled()
    assert cache.lengths.tolist() == [HELD] * 2
    assert turn.again.filled().lengths.tolist() == [0] * 2
    assert turn.again.new == HELD + 40
    for _ in range(3):
        out, cache = call(cache, *tokens)
        assert cache.lengths.tolist() == [HELD] * 2
        assert not cache.overflow.any()
        assert jnp.isfinite(out).all()


def test_a_wrong_result_shows_no_time_and_a_failure_does_not_end_the_run(monkeypatch, capsys):
    def wrong(cache, query, key, value):
        if cache.config.is_dense:
            raise RuntimeError("it rained")
        out, cache = attend(cache, query, key, value)
        return out.at[:, -1].multiply(1.1), cache

    attend = turns.attend
    monkeypatch.setattr(turns, "attend", wrong)
    chosen = [turn for turn in turns_of("--dtype", "float32") if turn.cache in ("dense", "small") and turn.new == 40]
    dense, small = turns.measure(chosen)
    assert (dense["us"], dense["reason"], dense["again_us"]) == (None, "RuntimeError: it rained", None)
    assert small["us"] is small["again_us"] is small["of_dense"] is small["of_again"] is None
    assert 0.02 < small["error"] < 0.1
    assert small["reason"].startswith("wrong: error ratio")
    turns.print_row(small)
    assert "wrong: error ratio" in capsys.readouterr().out


def test_sizes_are_looked_at_first(capsys):
    for wrong in (["--held", "0"], ["--new", "0"], ["--head-dim", "48"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            turns._parser().parse_args(wrong)
        assert wrong[0] in capsys.readouterr().err
