"""Caches saved and loaded: bit for bit, and refused where they are not what is wanted, or damaged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from mustafar_jax import LayerCache, load_cache, save
from mustafar_jax.quality.quantised import Quantised
from tests.helpers import exhaustive, rope_frequencies
from tests.mustafar_jax.test_blocks import ALL, empty
from tests.mustafar_jax.test_copies import filled

FEW = ("dense", "recommended", "small", "output-aware")


@pytest.mark.parametrize("name", [*FEW, *exhaustive(*(name for name in ALL if name not in FEW))])
def test_a_cache_comes_back_as_it_was(name, tmp_path):
    cache = filled(name, [100, 70, 5])
    save(cache, tmp_path / "cache")
    for like in (None, empty(name), jax.eval_shape(lambda: empty(name))):
        loaded = load_cache(tmp_path / "cache", like)
        assert jax.tree.structure(loaded) == jax.tree.structure(cache)
        jax.tree.map(np.testing.assert_array_equal, loaded, cache)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_the_caches_of_layers_of_several_kinds(tmp_path):
    caches = [empty("dense", jnp.bfloat16, batch=2), empty("fast", jnp.bfloat16, batch=2, capacity=100)]
    save(caches, tmp_path / "caches")
    loaded = load_cache(tmp_path / "caches", caches)
    assert isinstance(loaded, tuple)
    assert jax.tree.structure(list(loaded)) == jax.tree.structure(caches)
    with pytest.raises(ValueError, match="holds 2 caches; wanted 1"):
        load_cache(tmp_path / "caches", caches[:1])


def with_config(**fields):
    config = dataclasses.replace(ALL["recommended"], **fields)
    sizes = {"batch": 3, "capacity": 224, "num_kv_heads": 2, "head_dim": 32, "dtype": "float32"}
    return LayerCache.init(config, **sizes, inv_freq=rope_frequencies(32))


def with_theta(theta):
    sizes = {"batch": 3, "capacity": 224, "num_kv_heads": 2, "head_dim": 32, "dtype": "float32"}
    return LayerCache.init(ALL["recommended"], **sizes, inv_freq=rope_frequencies(32, theta))


@pytest.mark.parametrize(
    ("message", "like"),
    [
        ("batch=3, wanted 2, for cache 0", lambda: empty("recommended", batch=2)),
        ("capacity=224, wanted 225", lambda: empty("recommended", capacity=225)),
        ("dtype='float32', wanted 'bfloat16'", lambda: empty("recommended", jnp.bfloat16)),
        ("config has k_sparsity=0.7 instead of 0.5, for cache 0", lambda: with_config(k_sparsity=0.5)),
        ("inv_freq differs: these are keys of a model with other RoPE frequencies", lambda: with_theta(500000.0)),
        ("config has .*center_keys=True instead of False", lambda: empty("published")),
    ],
)
def test_another_kind_of_cache_is_refused(message, like, tmp_path):
    save(empty("recommended"), tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "cache", like())


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "cache"
    save(filled("recommended", [100, 70, 5]), path)
    whole = path.read_bytes()
    with safe_open(path, framework="numpy") as opened:
        metadata, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cache is damaged, or no safetensors file"):
        load_cache(path)
    save_file(arrays, path)
    with pytest.raises(ValueError, match="says that it is of format None; wanted 'mustafar_jax caches, version 1'"):
        load_cache(path)
    about = json.loads(metadata["about"])
    for broken in (
        "no JSON",
        json.dumps({"caches": about["caches"]}),
        json.dumps(about | {"caches": [{"batch": 1}]}),
        json.dumps(about | {"caches": [3]}),
    ):
        save_file(arrays, path, metadata | {"about": broken})
        with pytest.raises(ValueError, match="is damaged: its metadata does not say what it holds"):
            load_cache(path)
    save_file({name: x for name, x in arrays.items() if name != "0.keys.packed.bitmap"}, path, metadata)
    with pytest.raises(ValueError, match=r"is damaged: 0\.keys\.packed\.bitmap is missing, or not of the"):
        load_cache(path)
    save_file(arrays | {"0.lengths": np.array([1, 2, 999], np.int32)}, path, metadata)
    with pytest.raises(ValueError, match=r"is damaged: lengths \[1, 2, 999\] do not lie in 0 .. 224"):
        load_cache(path)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "nothing")


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(TypeError, match="cache is of type str; wanted a LayerCache"):
        save("cache", path)
    with pytest.raises(TypeError, match=r"caches is \[\]; wanted at least one LayerCache"):
        save([], path)
    sizes = {"batch": 1, "capacity": 100, "num_kv_heads": 1, "head_dim": 32, "dtype": "float32"}
    with pytest.raises(ValueError, match="config is a Quantised; only caches of a CompressionConfig are saved"):
        save(LayerCache.init(Quantised(), **sizes), path)
    with pytest.raises(ValueError, match="caches are traced, as under"):
        jax.jit(lambda cache: save(cache, path))(empty("dense"))
    assert not path.exists()
