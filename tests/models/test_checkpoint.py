import functools
import json
import os
import re
import subprocess
import sys
import textwrap

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mustafar_jax import models
from mustafar_jax.models import LazyTensor, Llama, Mistral, Qwen2, Qwen3, load_weights
from mustafar_jax.models.folder import open_safetensors
from mustafar_jax.sharding import weight_spec
from tests import quick
from tests.helpers import exhaustive
from tests.models.odd import HF_SMALL, SMALL, lazy, small_arrays, write_small
from tests.models.reference import TINY, TOLERANCE, forward, random_model, random_tokens, torch_logits
from tests.models.variants import tiny_model


def weights_of(model):
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


# Folders


@pytest.mark.parametrize("max_shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize(
    ("variant", "model_class"),
    [("llama-2", Llama), ("mistral-0.1", Mistral), ("qwen2", Qwen2), ("qwen3-window-and-biases", Qwen3)],
)
def test_folders_sharded_or_not(variant, model_class, max_shard_size, tmp_path):
    reference = tiny_model(variant)
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (max_shard_size == "60KB")
    model, tokenizer = models.load(str(tmp_path))
    assert type(model) is model_class
    assert tokenizer is None
    for name, parameter in weights_of(model).items():
        hugging_face = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
        wanted = reference.get_parameter(
            hugging_face if hugging_face.startswith("lm_head") else f"model.{hugging_face}"
        )
        np.testing.assert_array_equal(parameter.reshape(wanted.shape), wanted.detach().numpy())


def test_the_older_spelling_of_config_json_gives_the_same_model(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    reference = random_model(LlamaForCausalLM, LlamaConfig(**TINY, rope_parameters={**rope, "rope_theta": 5e5}))
    reference.save_pretrained(tmp_path)
    model, _ = models.load(tmp_path)

    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert "rope_theta" not in fields
    del fields["rope_parameters"], fields["dtype"]
    file.write_text(json.dumps(fields | {"rope_theta": 5e5, "rope_scaling": rope, "torch_dtype": "float32"}))
    older, _ = models.load(tmp_path)
    assert older.config == model.config
    tokens = random_tokens(1, 100)
    np.testing.assert_allclose(forward(older, tokens), torch_logits(reference, tokens), atol=TOLERANCE, rtol=0)


def test_dtype_is_the_asked_one_else_the_stated_one_else_the_stored_one(tmp_path):
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in small_arrays().items()}
    write_small(tmp_path, arrays)
    assert models.load(tmp_path)[0].dtype == jnp.bfloat16
    write_small(tmp_path, arrays, torch_dtype="float16")
    assert models.load(tmp_path)[0].dtype == jnp.float16
    write_small(tmp_path, arrays, dtype="bfloat16", torch_dtype="float16")
    assert models.load(tmp_path)[0].dtype == jnp.bfloat16
    model, _ = models.load(tmp_path, dtype=jnp.dtype("float32"))
    assert model.dtype == jnp.float32
    for name, array in weights_of(model).items():
        assert array.dtype == np.float32, name
    np.testing.assert_array_equal(
        model.embed_tokens.embedding[...], arrays["model.embed_tokens.weight"].astype(np.float32)
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float64, "float8_e4m3fn", "fp16"])
def test_an_unsupported_dtype_is_refused(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"dtype=.* must be bfloat16, float16 or float32"):
        models.load(write_small(tmp_path), dtype=dtype)


def test_an_unsupported_stated_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype='float64' in config.json, supported"):
        models.load(write_small(tmp_path, dtype="float64"))


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [(2, None, (2,)), ([2, 5], None, (2, 5)), (2, [7, 9], (7, 9)), (2, 3, (3,)), (None, None, ())],
)
def test_stop_tokens_come_from_generation_config_first(config, generation, wanted, tmp_path):
    write_small(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert models.load(tmp_path)[0].config.eos_ids == wanted


def test_generation_config_without_stop_tokens_leaves_those_of_the_config(tmp_path):
    write_small(tmp_path, eos_token_id=4)
    (tmp_path / "generation_config.json").write_text("{}")
    assert models.load(tmp_path)[0].config.eos_ids == (4,)


def test_the_tokenizer_comes_along(tmp_path):
    words = Tokenizer(WordLevel({"<unk>": 0, "peace": 1, "war": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    _, tokenizer = models.load(write_small(tmp_path))
    assert tokenizer("war")["input_ids"] == [2]


def test_progress_is_reported_in_bytes_of_the_model(tmp_path):
    calls = []
    model, _ = models.load(write_small(tmp_path), dtype="bfloat16", progress=lambda *call: calls.append(call))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert [total for _, total in calls] == [total] * len(small_arrays())
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == total


def test_harmless_extra_tensors_are_ignored(tmp_path):
    arrays = small_arrays() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    models.load(write_small(tmp_path, arrays))


# Hub ids


def test_a_source_that_is_nothing(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"source='some/model' is no folder, no .gguf file, and no hub id"):
        models.load("some/model")


def test_a_missing_path_is_not_looked_up(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.gguf': there is no such file"):
        models.load(tmp_path / "absent" / "model.gguf")


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(repo_id, *, allow_patterns):
        asked.append(repo_id)
        return str(write_small(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = models.load("some/model")
    assert asked == ["some/model"]
    assert type(model) is Llama


# Tensors


def test_all_tensors_that_do_not_fit_are_named_before_any_is_read():
    def unread():
        raise AssertionError("read")

    tensors = {name: LazyTensor(array.shape, unread) for name, array in small_arrays().items()}
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = LazyTensor((16,), unread)
    tensors["model.layers.2.input_layernorm.weight"] = LazyTensor((8,), unread)
    tensors["model.layers.0.self_attn.k_proj.weight"] = LazyTensor((16, 8), unread)
    tensors["lm_head.weight"] = LazyTensor((8, 10), unread)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_weights(Llama, SMALL, tensors, dtype=jnp.float32)
    lines = str(error.value).splitlines()
    assert lines[0] == "the checkpoint's tensors do not fit the model:"
    assert set(re.split("[:,] ", lines[1].strip())) == {
        "missing",
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert lines[2] == ("  unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.2.input_layernorm.weight")
    assert lines[3].startswith("  of another shape: ")
    assert "lm_head.weight (8, 10), wanted (10, 8)" in lines[3]
    assert "model.layers.0.self_attn.k_proj.weight (16, 8), wanted (8, 8)" in lines[3]
    assert len(lines) == 4


def test_a_tensor_that_is_not_as_announced():
    tensors = lazy(small_arrays())
    tensors["model.norm.weight"] = LazyTensor((8,), lambda: np.ones(7, np.float32))
    with pytest.raises(ValueError, match=r"model.norm.weight was announced with shape \(8,\) and read with \(7,\)"):
        load_weights(Llama, SMALL, tensors, dtype=jnp.float32)


def test_tensors_are_read_one_at_a_time():
    """What one read has returned is let go before the next."""
    alive, most = 0, 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def read(array):
        nonlocal alive, most
        # Views would be counted as well, so what is handed out is a plain view of the counted array.
        counted = array.copy().view(Counted)
        alive += 1
        most = max(most, alive)
        return np.asarray(counted)

    tensors = {name: LazyTensor(array.shape, functools.partial(read, array)) for name, array in small_arrays().items()}
    load_weights(Llama, SMALL, tensors, dtype=jnp.bfloat16)
    assert (alive, most) == (0, 1)


MEMORY_PROGRAM = """
    import pathlib, re, sys
    import jax
    from flax import nnx
    from mustafar_jax import models

    def megabytes():
        # Not getrusage: its peak counts what the process was before it became this program.
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024 / 1e6

    models.load(sys.argv[1], dtype=sys.argv[3])  # a small one, for what loading anything needs
    before = megabytes()
    model, _ = models.load(sys.argv[2], dtype=sys.argv[3])
    peak = megabytes() - before
    sizes = [leaf.nbytes / 1e6 for leaf in jax.tree.leaves(nnx.state(model))]
    print(sum(sizes), max(sizes), peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", *exhaustive("float32")])
def test_memory_stays_below_the_model_and_its_largest_tensor(dtype, tmp_path):
    fields = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": True}
    fields |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    shapes = {name: variable for name, variable in _shapes(fields).items() if name != "lm_head.weight"}
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    write_small(small)
    write_small(large, {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}, **fields)
    model, largest, peak = map(float, run(MEMORY_PROGRAM, str(small), str(large), dtype).split())
    assert model > 100
    assert model * 0.9 < peak < model + largest


def _shapes(fields):
    """The tensors of a checkpoint like SMALL with other sizes."""
    sizes = HF_SMALL | fields
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    q, kv = (sizes[f"num_{kind}_heads"] * sizes["head_dim"] for kind in ("attention", "key_value"))
    by_axis = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "embed_tokens": (sizes["vocab_size"], hidden),
        "lm_head": (sizes["vocab_size"], hidden),
    }  # fmt: skip
    return {name: next((s for end, s in by_axis.items() if end in name), (hidden,)) for name in small_arrays()}


def run(program, *arguments, **environment):
    """The standard output of a program in a fresh process."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Several devices

MESH_PROGRAM = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from mustafar_jax import models
    from mustafar_jax.config import CompressionConfig

    folder, out, kinds = sys.argv[1:]
    tokens = jnp.arange(12).reshape(2, 6) % 10
    config = CompressionConfig(k_sparsity=0, v_sparsity=0)

    @nnx.jit
    def run(model):
        caches = model.init_cache(config, batch=2, capacity=8)
        hidden, step = model.embed(tokens), model.embed(tokens[:, 0])
        for layer, cache in zip(model.layers, caches, strict=True):
            hidden, cache = layer.prefill(hidden, cache, jnp.array([6, 4]))
            step, cache = layer.decode(step, cache)
        return model.logits(hidden)[:, :4], model.logits(step), model(tokens)

    results = {}
    kind = jax.sharding.AxisType[kinds]
    for name, mesh in {"one": None, "two": jax.make_mesh((2,), ("tensor",), axis_types=(kind,))}.items():
        model, _ = models.load(folder, mesh=mesh)
        weights = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
        results |= {f"{name}{i}": np.asarray(logits) for i, logits in enumerate(run(model))}
    assert {len(weight.sharding.device_set) for weight in weights.values()} == {2}
    for path in ("embed_tokens.embedding", "layers.0.self_attn.q_proj.kernel", "layers.0.self_attn.o_proj.kernel",
                 "layers.0.mlp.down_proj.kernel", "norm.scale"):
        print(path, tuple(weights[path].sharding.spec))
    np.savez(out, **results)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["Explicit", *exhaustive("Auto")])
def test_a_model_on_two_devices_gives_the_same_logits(kind, tmp_path):
    write_small(tmp_path)
    printed = run(
        MESH_PROGRAM, str(tmp_path), str(tmp_path / "out.npz"), kind,
        JAX_PLATFORMS="cpu", XLA_FLAGS=f"{quick.flags()} --xla_force_host_platform_device_count=2",
    )  # fmt: skip
    specs = dict(line.split(" ", 1) for line in printed.splitlines())
    assert specs["embed_tokens.embedding"] == "('tensor', None)"
    assert specs["layers.0.self_attn.q_proj.kernel"] == "('tensor', None, None)"
    assert specs["layers.0.self_attn.o_proj.kernel"] == "(None, 'tensor', None)"
    assert specs["layers.0.mlp.down_proj.kernel"] == "(None, 'tensor')"
    assert specs["norm.scale"] == "(None,)"
    with np.load(tmp_path / "out.npz") as results:
        for index in range(3):
            np.testing.assert_allclose(results[f"two{index}"], results[f"one{index}"], atol=1e-5, rtol=0)


def test_axes_that_a_mesh_does_not_divide_stay_whole():
    mesh = jax.sharding.AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    model = models.checkpoint._abstract_model(Llama, SMALL, jnp.dtype("float32"))
    kernels = model.layers[0].self_attn
    specs = {
        name: weight_spec(kernel.get_metadata()["out_sharding"], kernel.shape, mesh)
        for name, kernel in (("q", kernels.q_proj.kernel), ("k", kernels.k_proj.kernel))
    }
    assert specs == {"q": PartitionSpec("tensor", None, None), "k": PartitionSpec(None, None, None)}


def test_a_mesh_with_an_unknown_axis_is_refused():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ValueError, match=r"mesh has the axis 'model'; wanted none but data, tensor, context"):
        load_weights(Llama, SMALL, lazy(small_arrays()), dtype=jnp.float32, mesh=mesh)


def test_opening_reads_no_tensor(tmp_path):
    tensors, dtype = open_safetensors(write_small(tmp_path))
    assert dtype == "float32"
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: a.shape for n, a in stored.items()}
    np.testing.assert_array_equal(tensors["lm_head.weight"].read(), stored["lm_head.weight"])
