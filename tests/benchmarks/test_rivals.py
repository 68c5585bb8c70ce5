"""Caches in few bits that a user could write."""

import json

import pytest

from benchmarks import attention, rivals


@pytest.fixture(autouse=True)
def _little_is_copied(monkeypatch):
    monkeypatch.setattr(attention, "COPY_BYTES", 2**16)
    monkeypatch.setattr(attention, "SWEEP_BYTES", 2**10)


def test_rows_are_checked_timed_and_kept(tmp_path):
    rivals.main(["--shapes", "tiny", "--implementations", "xla", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense in 4 bits, xla", "dense in 8-bit floats, xla"]
    dense = 2 * 2 * 2 * 256 * 32
    assert [row["bytes"] for row in rows] == [dense // 2 + dense // 32 * 2, dense]
    assert all(row["us"] > 0 and row["error"] < 5e-3 for row in rows)


def test_a_wrong_result_shows_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "TOLERANCE", 0.0)
    rivals.main(["--shapes", "tiny", "--implementations", "xla", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["us"] for row in rows] == [None, None]
    assert rows[0]["reason"].startswith("wrong: error ratio")
