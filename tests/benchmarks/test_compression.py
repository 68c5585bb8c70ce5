import json

import jax
import pytest

from benchmarks import attention, compression
from benchmarks.compression import Prompt, Steps
from benchmarks.synthetic import Shape
from mustafar_jax import pack
from mustafar_jax.pruning import magnitude_mask

SMALL = Shape("small", 1, 1, 1, 64, 64)


@pytest.mark.exhaustive
def test_rows_are_checked_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "COPY_BYTES", 2**16)
    monkeypatch.setitem(compression.SHAPES, "tiny", SMALL)
    sizes = ["--shapes", "tiny", "--rules", "published", "--sparsities", "0.7", "--interpret", "--attention", "xla"]
    compression.main([*sizes, "--implementations", "xla", "triton", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "compression.json").read_text())["rows"]
    assert [(row["what"], row["implementation"]) for row in rows] == [
        ("prompt", "triton"), ("steps", "xla"), ("steps", "triton"),
    ]  # fmt: skip
    prompt, steps, refused = rows
    assert prompt["us"] > 0
    assert prompt["error"] == 0
    assert prompt["bytes"] == SMALL.dense_nbytes + 2 * 64 * (8 + 2 * 20)
    assert (steps["error"], steps["us"]) == (0, None)  # no GPU, so nothing tells the parts of a step
    assert steps["reason"].startswith("no GPU")
    assert refused["reason"].startswith("NotImplementedError")
    assert all(row["where"]["jax"] == jax.__version__ for row in rows)
    assert "of a copy's speed" in capsys.readouterr().out


def test_a_wrong_pack_shows_no_time():
    prompt = Prompt(SMALL, "published", 0.7)
    programs = {
        ("pack", prompt): lambda targets, tokens, ranking: targets,  # packs nothing
        ("error", prompt): jax.jit(prompt.error),
    }
    row = compression.measure_prompt(prompt, programs)
    assert (row["us"], row["error"]) == (None, pytest.approx(1))


def test_wrong_entries_and_wrong_masks_are_both_seen_and_ties_are_not():
    prompt = Prompt(SMALL, "published", 0.7)
    tokens, [empty, _] = prompt.tokens(), prompt.targets()
    error = jax.jit(prompt.error)

    def packed(key, mask_of):
        return [pack(x.swapaxes(1, 2), magnitude_mask(mask_of(x.swapaxes(1, 2)), 0.7)) for x in (key, tokens[1])]

    assert empty.bitmap.shape == packed(tokens[0], lambda x: x)[0].bitmap.shape
    assert error(packed(tokens[0], lambda x: x), tokens, (None, None)) == 0
    assert error(packed(1.02 * tokens[0], lambda x: x), tokens, (None, None)) > compression.TOLERANCE
    assert error(packed(tokens[0], lambda x: x.at[:, :, 5].set(1)), tokens, (None, None)) > compression.TOLERANCE
    assert error(packed(tokens[0], lambda x: x * 1.01), tokens, (None, None)) < compression.TOLERANCE


def test_a_group_that_is_wrong_differs():
    one = jax.random.normal(jax.random.key(0), (1, 95, 2, 64))
    assert compression.different(one, one + 1e-3) == 0
    assert compression.different(one, one.at[:, 7].multiply(1.5)) > compression.TOLERANCE


@pytest.mark.parametrize("rule", ["published", "recommended"])
def test_the_steps_pack_one_group_of_every_sequence(rule):
    steps = Steps(Shape("wide", 2, 1, 1, 200, 32), rule, 0.7, "xla", "xla")
    before = steps.config.packed_tokens(steps.length)
    assert steps.config.packed_tokens(steps.length + 1) == before + steps.config.group
    assert steps.config.packed_tokens(steps.length + steps.config.group) == before + steps.config.group
    assert len(steps.tokens()[0]) == steps.config.group
