import json

import jax
import pytest

import mustafar_jax as mj
from benchmarks import attention, synthetic, tune
from benchmarks.synthetic import Shape
from tests.pallas_kernels.lowering import lower_for_cuda


def test_the_fastest_splits_of_a_size_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "SWEEP_BYTES", 0)
    monkeypatch.setattr(tune, "require_gpu", lambda _: None)
    monkeypatch.setattr(tune, "SPLITS", (1, 2))
    # interpreting a kernel takes long; that the kernels take the caches is tested below
    monkeypatch.setattr(tune, "attention", lambda *_, **__: mj.decode_attention)
    path = tmp_path / "tuned.json"
    other = {"heads": 8, "tiles": 4, "splits": 4, "us": 3.0}
    old = {"heads": 1, "tiles": 1, "splits": 9, "us": 1.0}
    path.write_text(json.dumps({"GPU": {"triton": [other]}, "cpu": {"triton": [other, old]}}))
    arguments = ["--kernels", "triton", "--sizes", "1x1", "--group", "1", "--head-dim", "32"]
    tune.main([*arguments, "--output", str(path)])
    tuned = json.loads(path.read_text())
    assert tuned["GPU"] == {"triton": [other]}
    entry, kept = tuned["cpu"]["triton"]
    assert kept == other
    assert entry["splits"] == 1  # no more than tiles
    assert entry["us"] > 0
    assert "1 heads of 1 tiles" in capsys.readouterr().out


def test_splits_are_tried_that_fill_a_device():
    tried = {heads: [n for n in tune.SPLITS if tune.plausible("mosaic_gpu", heads, 128, n)] for heads in (8, 64, 1024)}
    assert tried == {8: [11, 16, 24, 32, 64, 66, 128], 64: [2, 3, 4, 6, 8, 11, 16], 1024: [1]}


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_kernels_take_the_caches_that_are_timed(kernel):
    shape = Shape("small", 1, 2, 4, 160, 64)
    arguments = jax.eval_shape(lambda: (synthetic.query(shape), synthetic.empty_cache(shape, tune.CONFIG)))
    assert "custom_call" in lower_for_cuda(tune.attention(kernel, 1), *arguments)
