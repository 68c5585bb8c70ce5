"""Launch parameters: tuned ones near what was tuned, computed ones elsewhere."""

import importlib.resources
import itertools
import json

import pytest

from mustafar_jax.pallas_kernels import cuda, launch
from mustafar_jax.pallas_kernels.mosaic import decode_attention
from mustafar_jax.pallas_kernels.mosaic import launch as mosaic
from mustafar_jax.pallas_kernels.mosaic.plan import Layout
from mustafar_jax.pallas_kernels.triton import launch as triton


@pytest.mark.parametrize(
    ("heads", "rows", "splits"),
    [
        (8, 128, 1),  # one tile
        (8, 100, 1),
        (8, 4096, 32),  # fewer tiles than places for blocks: a tile each
        (64, 16384, 32),  # a few blocks for each place, so that none is idle for long at the end
        (8192, 4096, 1),  # many more heads than places
    ],
)
def test_computes_splits_that_fill_a_device(heads, rows, splits, monkeypatch):
    monkeypatch.setattr(launch, "_tuned", lambda device, kernel: [])
    assert triton.decode_params(heads=heads, rows=rows).splits == splits


@pytest.mark.parametrize(
    ("heads", "rows", "splits"),
    [
        (256, 4096, 1),  # one wave
        (64, 16384, 4),  # one wave
        (8, 100, 1),
        (8, 4096, 32),  # fewer tiles than places for blocks: a tile each
        (140, 4096, 3),  # one split would leave half of the places idle
    ],
)
def test_computes_splits_in_whole_waves_for_mosaic_gpu(heads, rows, splits, monkeypatch):
    monkeypatch.setattr(launch, "_tuned", lambda device, kernel: [])
    assert mosaic.mosaic_params(heads=heads, rows=rows, group=4, slots=128).splits == splits


@pytest.mark.parametrize(
    ("heads", "rows", "splits"),
    [
        (256, 4096, 1),  # two waves, the second nearly whole
        (64, 16384, 2),  # one wave
        (32, 32768, 4),
    ],
)
def test_splits_of_wide_blocks_fill_a_device(heads, rows, splits, monkeypatch):
    monkeypatch.setattr(cuda, "core_count", lambda: 132)
    assert mosaic.mosaic_params(heads=heads, rows=rows, group=1, slots=80) == mosaic.MosaicParams(splits, 12)


@pytest.mark.parametrize(
    ("heads", "rows", "group", "slots", "warps"),
    [
        (64, 16384, 8, 96, 12),
        (64, 16384, 9, 96, 4),
        (64, 16384, 8, 97, 4),
        (64, 75 * 128, 1, 80, 12),  # 12.1 units per warp
        (64, 74 * 128, 1, 80, 4),
    ],
)
def test_blocks_are_wide_only_where_registers_and_tokens_suffice(heads, rows, group, slots, warps, monkeypatch):
    monkeypatch.setattr(cuda, "core_count", lambda: 132)
    assert mosaic.mosaic_params(heads=heads, rows=rows, group=group, slots=slots).warps == warps


@pytest.mark.parametrize("wrong", [{"splits": 0}, {"splits": 1, "warps": 6}])
def test_refuses_what_no_block_can_be(wrong):
    with pytest.raises(ValueError, match="multiple of 4 warps"):
        mosaic.MosaicParams(**wrong)


def test_takes_tuned_splits_for_sizes_near_the_tuned_ones(monkeypatch):
    entries = {
        "triton": [{"heads": 64, "tiles": 128, "splits": 7}, {"heads": 8, "tiles": 4, "splits": 4}],
        "mosaic_gpu": [{"heads": 64, "tiles": 128, "splits": 5}],
    }
    monkeypatch.setattr(launch, "_tuned", lambda device, kernel: entries[kernel])
    assert triton.decode_params(heads=64, rows=128 * 128).splits == 7
    assert triton.decode_params(heads=60, rows=120 * 128).splits == 7
    assert triton.decode_params(heads=64, rows=512 * 128).splits != 7
    assert triton.decode_params(heads=8, rows=3 * 128).splits == 3  # never more than tiles
    assert mosaic.mosaic_params(heads=60, rows=120 * 128, group=4, slots=128).splits == 5


@pytest.mark.parametrize(
    ("facts", "params"),
    [
        ({"heads": 64, "rows": 16384}, mosaic.MosaicParams(2, 12)),  # one wave of wide blocks
        ({"heads": 48, "rows": 16384}, mosaic.MosaicParams(11, 4, 4)),  # 96 of 132 could have a wide one
        ({"heads": 8, "rows": 16384}, mosaic.MosaicParams(16, 12)),  # 2.7 units per warp
        ({"heads": 8, "rows": 64 * 128}, mosaic.MosaicParams(32, 8, 2)),  # 1.3 of wide ones
        ({"heads": 256, "rows": 4096}, mosaic.MosaicParams(1, 8, 2)),
        ({"heads": 128, "rows": 16384, "head_dim": 64, "words": 16}, mosaic.MosaicParams(2, 8, 2)),
        ({"heads": 8, "rows": 131072}, mosaic.MosaicParams(16, 12)),
        ({"heads": 8, "rows": 4096}, mosaic.MosaicParams(16, 8)),
        ({"heads": 8, "rows": 0}, mosaic.MosaicParams(1, 8)),
        ({"heads": 64, "rows": 16384, "words": 64}, mosaic.MosaicParams(6, 4, 3)),
        ({"heads": 64, "rows": 16384, "words": None}, mosaic.MosaicParams(4, 4, 2)),
        ({"heads": 128, "rows": 16384, "head_dim": 64, "words": None}, mosaic.MosaicParams(4, 4, 4)),
        ({"heads": 64, "rows": 16384, "group": 16}, mosaic.MosaicParams(6, 4, 3)),
        ({"heads": 64, "rows": 16384, "group": 16, "centred": True}, mosaic.MosaicParams(4, 4, 2)),
    ],
)
def test_codes_have_as_many_warps_as_registers_suffice_for(facts, params, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 132)
    usual = {"group": 4, "head_dim": 128, "words": 32, "centred": False}
    assert mosaic.coded_params(**usual | facts) == params


@pytest.mark.parametrize("rows", [16384, 16384 + 512, 2 * 16384])
def test_a_mean_s_slow_pairs_leave_wide_blocks_one_wave(rows, monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 132)
    codes = Layout(rows, 0, bits=4)
    params = decode_attention._params(64, rows, 4, 128, (codes, codes), centred=True, slow=True)
    assert params == mosaic.MosaicParams(2, 12)


def test_blocks_that_fit_at_once_follow_the_device(monkeypatch):
    assert (triton.wave(), mosaic.wave()) == (528, 264) or cuda.core_count() is not None
    monkeypatch.setattr(cuda, "core_count", lambda: 58)
    monkeypatch.setattr(launch, "_tuned", lambda device, kernel: [])
    assert mosaic.wave() == 116
    assert mosaic.mosaic_params(heads=16, rows=128 * 128, group=4, slots=128).splits == 7  # 112 of 116 blocks


def test_what_was_tuned_is_well_formed():
    tuned = json.loads(importlib.resources.files("mustafar_jax.pallas_kernels").joinpath("tuned.json").read_text())
    for kernels in tuned.values():
        assert set(kernels) <= {"triton", "mosaic_gpu"}
        for entry in itertools.chain.from_iterable(kernels.values()):
            assert 1 <= entry["splits"] <= entry["tiles"]
            assert entry["heads"] >= 1


def test_refuses_no_splits():
    with pytest.raises(ValueError, match="splits=0 must be at least 1"):
        triton.DecodeParams(0)
