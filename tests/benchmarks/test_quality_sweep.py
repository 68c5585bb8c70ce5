"""What a sweep measures, and what it makes of the records."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quality_caches, quality_sweep
from mustafar_jax.pruning import Context
from mustafar_jax.quality.runs import Run


def test_caches_have_names_of_their_own():
    names = [cache.name for cache in quality_caches.caches()]
    assert len(set(names)) == len(names)
    assert names[0] == "dense-0"
    assert all(name.replace("-", "").replace(".", "").replace("_", "").isalnum() for name in names)


@pytest.mark.parametrize("by_query", [False, True])
def test_an_explicit_count(by_query):
    method = "output_aware" if by_query else "magnitude"
    config = quality_caches.Counted(0.75, 0.75, k_method=method, count=13)
    rng = np.random.default_rng(0)
    x, queries = (jnp.asarray(rng.standard_normal((1, 2, 32, 64)), jnp.float32) for _ in range(2))
    context = Context(jnp.ones((1, 32), bool), queries)
    for rule, weighted in ((config.key_method, by_query), (config.value_method, False)):
        mask = np.asarray(rule.mask(x, 0.75, context))
        score = np.abs(x) * (np.abs(queries).sum(axis=2, keepdims=True) if weighted else 1)
        np.testing.assert_array_equal(mask, score >= np.sort(score, axis=-1)[..., -13, None])
    assert config.true_sparsity(64) == (1 - 13 / 64, 1 - 13 / 64)
    assert config.slots(64) == (16, 16)


def test_collecting(tmp_path):
    given = {"magnitude-K-0.5": {"a": 1.25, "c": 9.0, "b": 2.0}, "dense-0": {"b": 1.0, "a": 0.5}}
    for name, losses in given.items():
        common = {"model": "m", "dtype": "float32", "data": {}, "where": {}, "examples": ["a", "b", "c"]}
        run = Run(tmp_path / "runs" / name / "perplexity", common)
        run.add({"id": each, "group": f"of {each}", "scores": {"loss": loss}} for each, loss in losses.items())
        about = {"rule": name, "pruned": "", "kind": "", "sparsity": None, "true_sparsity": None}
        run.finish(about | {"bytes": {"held": 1}})
    Run(tmp_path / "runs" / "begun" / "perplexity", {"examples": []})
    file = tmp_path / "sweep.json"
    quality_sweep.write(file, quality_sweep.collect(tmp_path / "runs"))
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == ["dense-0", "magnitude-K-0.5"]
    assert [row["tests"]["perplexity"]["scores"]["loss"] for row in found["rows"]] == [[0.5, 1.0], [1.25, 2.0]]
    assert found["examples"] == {"perplexity": ["a", "b"]}
    assert found["groups"] == {"perplexity": ["of a", "of b"]}
    with pytest.raises(ValueError, match="begun holds no finished test of any cache"):
        quality_sweep.collect(tmp_path / "runs" / "begun")
