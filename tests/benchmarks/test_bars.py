import json

import pytest

from benchmarks import bars
from benchmarks.bars import Bar, Results

CONTEXTS = [f"1 x {tokens}" for tokens in (1024, 4096, 16384, 65536, 131072)]


def verdicts(folder):
    """The first word of each bar's line, by the bar's text."""
    results = Results(folder)
    return {bar.text: bar.line(results).split()[0] for bar in bars.bars()}


def attention_rows(us):
    """Rows of all that the bars look at, in the time that `us` gives for shape, sparsity, kernel and mask."""
    names = [(0.0, "dense, cuDNN", "cudnn", "random")]
    for kernel in ("triton", "mosaic_gpu"):
        names += [(sparsity, f"published {sparsity}, {kernel}", kernel, "random") for sparsity in (0.5, 0.7)]
        names += [(0.7, f"published 0.7, {kernel}, {mask} mask", kernel, mask) for mask in bars.MASKS[1:]]
        names += [(0.7, f"recommended 0.7, {kernel}", kernel, "random")]
    return [
        {"shape": shape, "name": name, "us": us(shape, sparsity, kernel, mask), "bytes": 1000 * (1 - 0.9 * sparsity)}
        | WHERE
        for shape in ("A", "B", "B, group 1", "B, group 8", *CONTEXTS)
        for sparsity, name, kernel, mask in names
    ]


WHERE = {"where": {"device": "NVIDIA H100 80GB HBM3"}}


def good(shape, sparsity, kernel, mask):
    scale = 1000.0 if shape[0] in "AB" else float(shape.partition(" x ")[2])
    return 0.15 * scale * (1 - 0.7 * sparsity)


def generation_row(sparsity, **fields):
    speed = 1 + 1.2 * sparsity
    return {
        "status": "ok", "shape": "llama-3-8b", "sparsity": sparsity, "new_tokens": 256, "largest": False,
        "tokens_per_s": 100 * speed, "ttft_s": 2.0, "decode_bytes": 103, "weights_bytes": 50, "cache_bytes": 50,
        "layer_attention_us": 160.0, "flatness": 0.01,
    } | WHERE | fields  # fmt: skip


def generation_rows():
    for sparsity in (0.0, 0.5, 0.7):
        for context, batch in ((16384, 8), (65536, 1), (16384, 1)):
            yield generation_row(sparsity, context=context, batch=batch)
        batch = {0.0: 20, 0.5: 33, 0.7: 47}[sparsity]
        fits = {"planned_batch": batch, "larger_fits": False}
        yield generation_row(sparsity, context=16384, batch=batch, largest=True, **fits)
    yield generation_row(0.7, context=4096, batch=8, new_tokens=4096)


@pytest.fixture
def folder(tmp_path):
    compression = [
        {"what": what, "rule": rule, "us": 10.0, "copy_us": 8.0, "share": 0.02} | WHERE
        for what in ("prompt", "steps")
        for rule in ("published", "recommended")
    ]
    agreement = {"attention_rms": 0.003, "rms": 0.01, "bar": 0.02, "greedy": True, "ratios": [0.01] * 1024}
    files = {
        "attention": {"rows": attention_rows(good)},
        "compression": {"rows": compression},
        "generation": {"rows": list(generation_rows())},
        "agreement": agreement,
    }
    for name, contents in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(contents))
    return tmp_path


def change(folder, name, alter):
    path = folder / f"{name}.json"
    contents = json.loads(path.read_text())
    for row in contents.get("rows", [contents]):
        alter(row)
    path.write_text(json.dumps(contents))


def test_good_results_pass_all_bars(folder, capsys):
    assert {text: verdict for text, verdict in verdicts(folder).items() if verdict != "pass"} == {}
    bars.main([str(folder)])
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(list(bars.bars()))} pass, 0 FAIL, 0 missing"


def test_of_nothing_everything_is_missing(tmp_path):
    assert set(verdicts(tmp_path).values()) == {"missing"}


@pytest.mark.parametrize(
    ("name", "where", "fields", "failing"),
    [
        ("attention", {"name": "published 0.7, mosaic_gpu, half mask", "shape": "B"}, {"us": 1000.0}, ["half mask"]),
        ("attention", {"name": "published 0.7, triton", "shape": "B, group 8"}, {"us": 110.0}, ["8 query heads"]),
        ("attention", {"name": "recommended 0.7, triton", "shape": "B"}, {"us": 90.0}, ["centred keys"]),
        ("attention", {"name": "dense, cuDNN", "shape": "1 x 4096"}, {"us": 1.0}, ["batch 1, 0.7"] * 2),
        ("attention", {"name": "published 0.7, triton", "shape": "1 x 65536"}, {"us": 9000.0}, ["growth of time"]),
        ("compression", {"what": "steps", "rule": "published"}, {"share": 0.04}, ["a step's compression, published"]),
        ("compression", {"what": "prompt"}, {"us": 12.0}, ["prune and pack a prompt"] * 2),
        ("generation", {"sparsity": 0.7, "context": 65536}, {"tokens_per_s": 99.0}, ["0.7, batch 1 at 65536"]),
        ("generation", {"sparsity": 0.7, "batch": 47}, {"larger_fits": True}, ["as planned within 5 %"]),
        ("generation", {"new_tokens": 4096}, {"flatness": 0.06}, ["step time of 4096 steps"]),
        ("generation", {"sparsity": 0.0, "batch": 8}, {"layer_attention_us": 100.0}, ["dense attention in a step"]),
        ("generation", {"sparsity": 0.7, "batch": 1}, {"ttft_s": 2.2}, ["first token at 0.7, batch 1"]),
        ("generation", {"sparsity": 0.7, "batch": 47}, {"decode_bytes": 106}, ["bytes in use while decoding"]),
        ("agreement", {}, {"rms": 0.03}, ["teacher-forced logits"]),
        ("agreement", {}, {"attention_rms": 0.006}, ["attention of a model's layers"]),
    ],
)
def test_a_result_that_is_not_good_enough_fails_its_bar(folder, name, where, fields, failing):
    def alter(row):
        if all(row[field] == value for field, value in where.items()):
            row.update(fields)

    change(folder, name, alter)
    found = [text for text, verdict in verdicts(folder).items() if verdict == "FAIL"]
    assert len(found) == len(failing)
    assert all(part in text for part, text in zip(failing, found, strict=True))


def test_bars_of_an_h100_are_not_judged_by_another_device(folder):
    change(folder, "attention", lambda row: row.update(where={"device": "NVIDIA H200"}))
    missing = [text for text, verdict in verdicts(folder).items() if verdict == "missing"]
    assert len(missing) == 2
    assert all("published CUDA kernels on an H100" in text for text in missing)


def test_no_folder_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bars.main([str(tmp_path / "none")])
    assert "none is no folder" in capsys.readouterr().err


def test_a_row_that_failed_is_missing(folder):
    change(folder, "attention", lambda row: row.update(us=None) if "triton" in row["name"] else None)
    found = {text.split()[0] for text, verdict in verdicts(folder).items() if verdict == "missing"}
    assert found == {"Triton", "bytes"}


def test_generations_without_a_prefill_or_with_one_in_chunks_are_not_judged(folder):
    path = folder / "generation.json"
    rows = json.loads(path.read_text())["rows"]
    filled = [row | {"filled": True, "tokens_per_s": 1.0} for row in rows]
    for row in filled:
        del row["ttft_s"]
    chunked = [row | {"filled": False, "chunk": 2048, "ttft_s": 1000.0 * row["sparsity"]} for row in rows]
    path.write_text(json.dumps({"rows": [*rows, *filled, *chunked]}))
    assert set(verdicts(folder).values()) == {"pass"}


def test_a_line_tells_what_was_measured_and_what_is_wanted(folder):
    bar = Bar("speed", 2.0, lambda results: 1.5, at_least=True)
    assert bar.line(Results(folder)) == "FAIL     speed: 1.5 (>= 2 is wanted)"
