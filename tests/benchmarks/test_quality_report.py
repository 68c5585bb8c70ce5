"""Tables and plots from results."""

import json
import pathlib

import pytest

from benchmarks import quality_report

BYTES = {"capacity": 9, "held": 400, "dense": 1000, "own_count": 300}


def row(rule, pruned, kl, name):
    scores = {"increase": [2 * each for each in kl], "kl": kl}
    tests = {"perplexity": {"bytes": BYTES, "scores": scores}}
    return {
        "name": name,
        "rule": rule,
        "pruned": pruned,
        "sparsity": [0.5, 0],
        "true_sparsity": [0.5, 0],
        "tests": tests,
    }


@pytest.fixture
def results():
    rows = [row("magnitude", "K", [1.0, 3.0], "magnitude-K-0.5"), row("ThinK", "K", [2.0, 6.0], "ThinK-K-0.5")]
    needles = {"bytes": BYTES, "scores": {"probability": [0.5, 0.5], "exact": [1.0, 1.0]}}
    rows[1]["tests"]["needle"] = needles
    where = {"device": "abacus", "jax": "1", "commit": "0123456789"}
    examples = {"perplexity": ["a", "b"], "needle": ["c", "d"]}
    groups = {"perplexity": ["novel", "news"], "needle": ["c", "c"]}
    return {
        "model": "m",
        "dtype": "float32",
        "data": {"t.txt": ""},
        "where": where,
        "examples": examples,
        "groups": groups,
        "rows": rows,
    }


def test_tables(results):
    lines = quality_report.caches_table(results)
    assert lines[2] == (
        "| magnitude | K | 0.5 | 40.0% | 30.0% | 4.0000 (2.0000 to 6.0000) | 2.0000 (1.0000 to 3.0000) "
        "| 2.0000 | not measured | not measured |"
    )
    assert lines[3].endswith("| 0.500 (0.500 to 0.500) | 1.000 (1.000 to 1.000) |")
    assert quality_report.comparisons_table(results)[2:] == [
        "| ThinK K 0.5 | magnitude K 0.5 | 2.00 (2.00 to 2.00) | 2.00 | 2.00 | 2.00 |"
    ]
    results["rows"][1]["tests"]["perplexity"]["scores"]["kl"] = [3.0, 6.0]
    assert quality_report.comparisons_table(results)[2].endswith("| 2.25 (2.00 to 3.00) | 3.00 | 2.00 | 2.50 |")
    assert quality_report.conditions(results) == [
        "m, float32; 2 windows, 2 needles of t.txt; abacus, jax 1, commit 0123456."
    ]


def test_documents_are_filled_again(results, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(results))
    tables = [f"<!-- {name}: sweep.json -->\nold\n<!-- end -->\n" for name in ("conditions", "caches")]
    text = "# Before\n" + "between\n".join(tables)
    filled = quality_report.fill(text, tmp_path)
    assert filled.startswith("# Before\n<!-- conditions: sweep.json -->\nm, float32;")
    assert "old" not in filled
    assert "between" in filled
    assert filled.count("| magnitude |") == 1
    assert quality_report.fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match=r"<!-- chart: \.\.\. --> names no table; wanted one of"):
        quality_report.fill("<!-- chart: sweep.json -->\n<!-- end -->", tmp_path)


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    results["rows"].append(row("ThinK", "K+V", [2.0, 6.0], "ThinK-K-V-0.5"))
    for draw in (quality_report.plot, quality_report.plot_frontier):
        draw(results, tmp_path / "drawn.png")
        assert (tmp_path / "drawn.png").stat().st_size > 10_000
        (tmp_path / "drawn.png").unlink()


def test_frontier():
    points = [(40, 0.2), (30, 0.3), (35, 0.4), (50, 0.2), (60, 0.1)]
    assert quality_report.frontier(points) == [(30, 0.3), (40, 0.2), (60, 0.1)]


def test_the_documents_tables_are_those_of_the_results():
    document = pathlib.Path(__file__).parents[2] / "docs" / "quality.md"
    text = document.read_text(encoding="utf-8")
    assert quality_report.fill(text, document.parent) == text
    assert "<!-- caches: " in text
