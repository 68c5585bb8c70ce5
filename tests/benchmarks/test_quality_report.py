"""Tables and plots from results."""

import json
import pathlib

import pytest

import mustafar_jax as mj
from benchmarks import quality_formats, quality_plots, quality_report, quality_results, quality_rules
from benchmarks.quality_caches import codes

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
    lines = quality_rules.caches_table(results)
    assert lines[2] == (
        "| magnitude | K | 0.5 | 40.0% | 30.0% | 4.0000 (2.0000 to 6.0000) | 2.0000 (1.0000 to 3.0000) "
        "| 2.0000 | not measured | not measured |"
    )
    assert lines[3].endswith("| 0.500 (0.500 to 0.500) | 1.000 (1.000 to 1.000) |")
    assert quality_rules.comparisons_table(results)[2:] == [
        "| ThinK K 0.5 | magnitude K 0.5 | 2.00 (2.00 to 2.00) | 2.00 | 2.00 | 2.00 |"
    ]
    results["rows"][1]["tests"]["perplexity"]["scores"]["kl"] = [3.0, 6.0]
    assert quality_rules.comparisons_table(results)[2].endswith("| 2.25 (2.00 to 3.00) | 3.00 | 2.00 | 2.50 |")
    assert quality_results.conditions(results) == [
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


@pytest.mark.exhaustive
def test_tables_of_several_results_and_of_none(formats, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(formats))
    text = "<!-- presets: a.json b.json -->\nold\n<!-- end -->\n<!-- preset-bytes: -->\nold\n<!-- end -->\n"
    filled = quality_report.fill(text, tmp_path)
    assert "old" not in filled
    assert filled.count("| fast | 25.0% |") == filled.count("| fast | 4.125, 4.125 |") == 1
    assert quality_report.fill(filled, tmp_path) == filled


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    results["rows"].append(row("ThinK", "K+V", [2.0, 6.0], "ThinK-K-V-0.5"))
    quality_plots.draw(results, tmp_path / "sweep.json")
    assert sizes(tmp_path).keys() == {"sweep.png", "sweep_frontier.png"}
    assert all(size > 10_000 for size in sizes(tmp_path).values())


def sizes(folder):
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def test_frontier():
    points = [(40, 0.2), (30, 0.3), (35, 0.4), (50, 0.2), (60, 0.1)]
    assert quality_plots.frontier(points) == [(30, 0.3), (40, 0.2), (60, 0.1)]


def coded(rule, pruned, bits, kl, held, config=None, sparsity=(0, 0), name=None):
    """A cache of a sweep of formats."""
    found = row(rule, pruned, kl, name or f"{rule}-{pruned}")
    found |= {"bits": list(bits), "kind": repr(config or mj.CompressionConfig(sink_tokens=4)), "sparsity": sparsity}
    found["tests"]["perplexity"]["bytes"] = {"capacity": 2048, "held": held, "dense": 1000, "own_count": held}
    return found


@pytest.fixture
def formats(results):
    wide = mj.CompressionConfig.preset("fast", residual_length=128)
    rows = [
        coded("dense", "", (16, 16), [0.0, 0.0], 1000),
        coded("KIVI-4", "K+V", (5, 5), [0.25, 0.25], 300),
        coded("recommended", "K+V", (6, 6), [1.0, 1.0], 400, sparsity=(0.7, 0.7), name="recommended-K-V-0.7"),
        coded("fast", "K+V", (4.25, 4.25), [0.5, 1.0], 250),
        coded("fast, 128 recent", "K+V", (4.25, 4.25), [0.5, 0.5], 300, wide),
        coded("rotated 4", "K", (4.25, 16), [0.5, 0.5], 600),
        coded("rotated 2", "V", (16, 2.25), [0.5, 0.5], 600),
    ]
    return results | {"rows": rows}


def test_tables_of_formats(formats):
    assert quality_formats.both_table(formats) == [
        "| cache | bits of keys | bits of values | bytes of dense, 2,048 tokens | loss over dense, nats "
        "| mean KL to dense, nats | KL, novel | KL, news | ahead of it |",
        "|---|---|---|---|---|---|---|---|---|",
        "| recommended 0.7 | 6 | 6 | 40.0% | 2.0000 (2.0000 to 2.0000) | 1.0000 (1.0000 to 1.0000) "
        "| 1.0000 | 1.0000 | KIVI-4 |",
        "| KIVI-4 | 5 | 5 | 30.0% | 0.5000 (0.5000 to 0.5000) | 0.2500 (0.2500 to 0.2500) | 0.2500 | 0.2500 |  |",
        "| fast, 128 recent | 4.25 | 4.25 | 30.0% | 1.0000 (1.0000 to 1.0000) | 0.5000 (0.5000 to 0.5000) "
        "| 0.5000 | 0.5000 | KIVI-4 |",
        "| fast | 4.25 | 4.25 | 25.0% | 1.5000 (1.0000 to 2.0000) | 0.7500 (0.5000 to 1.0000) | 0.5000 | 1.0000 |  |",
    ]
    for make, side in ((quality_formats.keys_table, "keys"), (quality_formats.values_table, "values")):
        lines = make(formats)
        assert lines[0].startswith(f"| cache | bits of {side} | bytes of dense, 2,048 tokens |")
        assert len(lines) == 3


def test_bytes_within_half_a_percent_are_equal(formats):
    mine, other = formats["rows"][3], formats["rows"][1]
    bytes_of_other = other["tests"]["perplexity"]["bytes"]
    for held, expected in ((251, "KIVI-4"), (252, "")):
        bytes_of_other["held"] = held
        assert quality_formats.ahead(mine, [mine, other]) == expected


def test_presets_of_several_sweeps_stand_beside_each_other(formats):
    other = formats | {"model": "qwen2.5-coder-1.5b.gguf", "rows": formats["rows"][3:]}
    lines = quality_formats.presets_table(formats, other)
    assert lines[0] == (
        "| cache | m, 2,048 tokens: bytes of dense | loss over dense, nats | mean KL to dense, nats "
        "| Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 2,048 tokens: bytes of dense "
        "| loss over dense, nats | mean KL to dense, nats |"
    )
    missing = " | not measured" * 3 + " |"
    assert lines[2:] == [
        "| fast" + " | 25.0% | 1.5000 (1.0000 to 2.0000) | 0.7500 (0.5000 to 1.0000)" * 2 + " |",
        "| recommended 0.7 | 40.0% | 2.0000 (2.0000 to 2.0000) | 1.0000 (1.0000 to 1.0000)" + missing,
        "| KIVI-4 | 30.0% | 0.5000 (0.5000 to 0.5000) | 0.2500 (0.2500 to 0.2500)" + missing,
    ]


def test_needles_by_length(formats):
    formats["groups"]["needle"] = ["needle 4096", "passkey 4096", "needle 8192", "passkey 8192"]
    size = {"capacity": 8200, "held": 250, "dense": 1000, "own_count": 250}
    dense, _, _, fast, *_ = formats["rows"]
    dense["tests"]["needle"] = {"bytes": size | {"held": 1000}, "scores": {"exact": [1.0] * 4}}
    fast["tests"]["needle"] = {"bytes": size, "scores": {"exact": [1.0, 1.0, 0.0, 0.0]}}
    lines = quality_formats.needles_table(formats)
    assert lines[0] == (
        "| cache | bytes of dense, 8,200 tokens | 4,096 tokens | 8,192 tokens | all | more than dense (paired) |"
    )
    assert lines[2] == "| dense | 100.0% | 1.000 | 1.000 | 1.000 (1.000 to 1.000) |  |"
    assert lines[3] == "| fast K+V | 25.0% | 1.000 | 0.000 | 0.500 (0.000 to 1.000) | -0.500 (-1.000 to 0.000) |"


def test_ruler_by_length(formats):
    formats["groups"]["ruler"] = ["vt 4096", "cwe 8192"]
    size = {"capacity": 8200, "held": 250, "dense": 1000, "own_count": 250}
    dense, _, _, fast, *_ = formats["rows"]
    dense["tests"]["ruler"] = {"bytes": size | {"held": 1000}, "scores": {"score": [0.8, 0.6]}}
    fast["tests"]["ruler"] = {"bytes": size, "scores": {"score": [0.8, 0.4]}}
    lines = quality_formats.ruler_table(formats)
    assert lines[2] == "| dense | 100.0% | 0.800 | 0.600 | 0.700 (0.600 to 0.800) |  |"
    assert lines[3] == "| fast K+V | 25.0% | 0.800 | 0.400 | 0.600 (0.400 to 0.800) | -0.100 (-0.200 to 0.000) |"


def test_bytes_of_presets_are_computed():
    lines = quality_formats.preset_bytes_table()
    assert len(lines) == 2 + len(quality_formats.NAMED)
    assert lines[2].startswith("| fast | 4.125, 4.125 | 28.3% | 26.1% | 4.25, 4.25 |")


def test_caches_to_choose_among_are_those_of_the_sweep():
    swept = {cache.name: cache.config for cache in codes()}
    for name, config in quality_formats.NAMED.items():
        rule, *sparsity = name.split()
        assert swept["-".join([rule, "K-V", *sparsity])] == config


def test_every_cache_of_the_sweep_has_a_family():
    for cache in codes():
        if cache.pruned == "K+V":
            sparsity = cache.config.k_sparsity, cache.config.v_sparsity
            found = coded(cache.rule, "K+V", (4, 4), [1.0], 1, cache.config, sparsity, cache.name)
            assert quality_plots.family(found) in quality_plots.FAMILIES
            longer = cache.config.sink_tokens > 4 or cache.config.residual_length > 32
            assert quality_results.has_longer_window(found) == longer


def test_plot_of_formats(formats, tmp_path):
    pytest.importorskip("matplotlib")
    quality_plots.draw(formats, tmp_path / "model.json")
    assert sizes(tmp_path).keys() == {"model_frontier.png"}
    assert sizes(tmp_path)["model_frontier.png"] > 10_000
    for found in formats["rows"]:
        del found["tests"]["perplexity"]
    quality_plots.draw(formats, tmp_path / "needles.json")
    assert len(sizes(tmp_path)) == 1


ROOT = pathlib.Path(__file__).parents[2]


def test_the_documents_tables_are_those_of_the_results():
    path = ROOT / "docs" / "quality.md"
    text = path.read_text(encoding="utf-8")
    assert quality_report.fill(text, path.parent) == text


def test_documents_have_tables():
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "<!-- caches: " in text
    assert "<!-- preset-bytes: -->" in text
