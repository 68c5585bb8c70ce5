"""A model on two devices: the tokens of one, whatever kind of mesh the weights and the caller have."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import exhaustive

PROGRAM = """
    import contextlib
    import json
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    import mustafar_jax as mj
    from mustafar_jax import models

    folder, kind, config = sys.argv[1], AxisType[sys.argv[2]], mj.CompressionConfig.recommended(residual_length=0)
    tokens = np.random.default_rng(0).integers(1, 50, (2, 40))
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(kind,))

    def run(model):
        key = jax.random.key(1)
        options = {"lengths": [40, 33], "max_new_tokens": 6, "config": config, "temperature": 0.8, "key": key}
        result = mj.generate(model, tokens, **options)
        again = result.tokens[:, 0] + 0  # as a program of the caller's uses it
        steps = np.stack(list(mj.stream(model, tokens, **options)), axis=1)
        scores = mj.log_likelihoods(model, tokens, prompt_length=38, config=config) * 1
        np.testing.assert_array_equal(steps, result.tokens)
        np.testing.assert_array_equal(again, steps[:, 0])
        return steps, np.asarray(scores)

    tokens_of_one, scores_of_one = run(models.load(folder)[0])
    for load_in, run_in in json.loads(sys.argv[3]):
        with jax.set_mesh(mesh) if load_in else contextlib.nullcontext():
            model, _ = models.load(folder, mesh=mesh)
        assert len(jax.tree.leaves(model)[0].sharding.device_set) == 2
        spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), model)
        for each in (model, spread):  # as they are loaded; and on axes of the mesh's own kind
            with jax.set_mesh(mesh) if run_in else contextlib.nullcontext():
                found, scores = run(each)
            np.testing.assert_array_equal(found, tokens_of_one)
            np.testing.assert_allclose(scores, scores_of_one, atol=1e-4, rtol=0)
    with jax.set_mesh(mesh):
        assert jax.sharding.get_mesh() == mesh
        found, _ = run(models.load(folder)[0])
        np.testing.assert_array_equal(found, tokens_of_one)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mesh")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


EVERYWHERE = [(False, False), (False, True), (True, True), (True, False)]
"""Whether the model is loaded within the mesh, and whether it is run there."""


@pytest.mark.parametrize(
    ("kind", "places"), exhaustive(("Explicit", [(True, True)]), ("Explicit", EVERYWHERE), ("Auto", EVERYWHERE))
)
def test_tokens_on_two_devices_are_those_on_one(kind, places, folder):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM), str(folder), kind, json.dumps(places)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
