"""Prompts into caches: some rows at a time, packed by whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax import attention
from mustafar_jax.backend import Operation
from mustafar_jax.backends import registry
from mustafar_jax.cache import packed
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import DENSE, prefill, prefill_prompt
from tests.helpers import exhaustive, replace_backend, to_dense
from tests.mustafar_jax.generation.setting import CAPACITY, CONFIGS, LENGTHS, PROMPTS, TINY, Compilations


@pytest.mark.parametrize(
    ("batch", "length", "rows"),
    [(1, 10, 1), (1, 5000, 1), (4, 250, 4), (4, 251, 2), (7, 250, 4), (10, 300, 3), (5, 1001, 1), (9, 1, 9)],
)
def test_as_many_prompts_at_a_time_as_fit_in_even_parts(batch, length, rows, monkeypatch):
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 1000)
    assert prefill._rows_at_a_time(batch, length) == rows


@pytest.mark.parametrize("name", ["dense", *exhaustive("recommended")])
def test_prompts_prefilled_some_at_a_time_equal_all_at_once(llama, name, monkeypatch):
    prompts, lengths = (jnp.asarray(np.concatenate([x, x[:1]]), jnp.int32) for x in (PROMPTS, LENGTHS))

    def run():
        calls: list[tuple[int, int]] = []
        caches = llama.init_cache(CONFIGS.get(name, DENSE), batch=5, capacity=CAPACITY)
        return *prefill_prompt(llama, prompts, lengths, caches, progress=lambda *call: calls.append(call)), calls

    logits, caches, calls = run()
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 2 * PROMPTS.shape[1])  # three parts, the last of them moved back
    with Compilations() as compiled:
        in_parts, caches_in_parts, calls_in_parts = run()
    assert compiled.count("_prefill_rows") == 1
    assert (len(calls), calls_in_parts) == (2, [(i + 1, 6) for i in range(6)])
    np.testing.assert_allclose(in_parts, logits, atol=1e-4, rtol=0)
    for one, other in zip(caches_in_parts, caches, strict=True):
        for held, wanted in zip(to_dense(one), to_dense(other), strict=True):
            np.testing.assert_allclose(held, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("implementation", "wanted"), [("xla", "xla"), ("triton", "triton"), (("cudnn", "xla"), "xla"), ("cudnn", "triton")]
)
def test_a_layer_packs_by_whom_it_is_told(llama, monkeypatch, implementation, wanted):
    packed_by: list[str] = []
    packed._pack_leaving.clear_cache()  # of what another case had here for the same names and shapes
    attention._decode.clear_cache()

    def pack(name, packing):
        packed_by.append(name)
        return packing.key.target, packing.value.target

    attends = Operation(lambda operands: operands.query)
    for name in ("triton", "xla", "cudnn"):  # as on a GPU: Triton is the best that packs
        packs = None if name == "cudnn" else Operation(functools.partial(pack, name))
        replace_backend(monkeypatch, name, needs_cuda=False, attend_packed=attends, pack=packs)
    (held, _), layer = (
        llama.init_cache(CompressionConfig(), batch=3, capacity=77),
        llama.layers[0],
    )  # a shape of its own
    hidden, lengths = jnp.zeros((3, 70, TINY.hidden_size)), jnp.full(3, 70)
    jax.eval_shape(functools.partial(layer.prefill, implementation=implementation), hidden, held, lengths)
    assert packed_by == [wanted]
    jax.eval_shape(functools.partial(layer.decode, implementation=implementation), hidden[:, 0], held)
    assert packed_by == [wanted] * 2


@pytest.mark.parametrize(
    ("implementation", "wanted"),
    [
        (None, None),
        ("xla", "xla"),
        ("triton", "triton"),
        ("cudnn", None),
        ("mosaic_gpu", None),
        (["mosaic_gpu", "triton", "xla"], ("triton", "xla")),
        (("cudnn", "mosaic_gpu"), None),
    ],
)
def test_who_packs_beside_who_attends(implementation, wanted):
    assert registry.packers(implementation) == wanted


BY_QUERIES = CompressionConfig(0.5, 0.5, k_method="output_aware", v_method="channel_output_aware")


@pytest.mark.parametrize(
    ("name", "config"),
    [("recommended", CONFIGS["recommended"]), *exhaustive(("dense", DENSE), ("by queries", BY_QUERIES))],
)
def test_chunks_equal_one_piece_and_compile_once_for_prompts_of_any_length(llama, name, config):
    lengths = jnp.asarray(LENGTHS, jnp.int32)

    def run(prompts, lengths, **options):
        return prefill_prompt(llama, prompts, lengths, llama.init_cache(config, batch=4, capacity=110), **options)

    logits, caches = run(jnp.asarray(PROMPTS), lengths)
    in_chunks, chunked = run(jnp.asarray(PROMPTS), lengths, chunk=32)  # three, of which the last ends beyond the room
    np.testing.assert_allclose(in_chunks, logits, atol=1e-4, rtol=0)
    for one, other in zip(chunked, caches, strict=True):
        for held, wanted in zip(to_dense(one), to_dense(other), strict=True):
            np.testing.assert_allclose(held, wanted, atol=1e-4, rtol=0)
        for part in ("key_mean", "query_norm", "queries"):
            if getattr(one, part, None) is not None:
                np.testing.assert_allclose(getattr(one, part), getattr(other, part), atol=1e-4, rtol=1e-5)
    longer, shorter = jnp.asarray(np.concatenate([PROMPTS, PROMPTS[:, :37]], axis=1)), jnp.asarray(PROMPTS[:, :5])
    with Compilations() as compiled:
        run(longer, jnp.asarray([107, 33, 64, 1], jnp.int32), chunk=32)
        run(shorter, jnp.asarray([1, 2, 3, 5], jnp.int32), chunk=32)
    assert compiled == []


def test_chunks_hold_no_more_than_the_caches(llama):
    caches = llama.init_cache(DENSE, batch=len(PROMPTS), capacity=8)
    with pytest.raises(ValueError, match="the caches' capacity is 8"):
        prefill_prompt(llama, jnp.asarray(PROMPTS), jnp.asarray([1] * len(PROMPTS), jnp.int32), caches, chunk=4)


@pytest.mark.parametrize(("chunk", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_chunk_is_a_number_of_tokens(llama, chunk, error):
    caches = llama.init_cache(DENSE, batch=4, capacity=CAPACITY)
    with pytest.raises(error, match="chunk="):
        prefill_prompt(llama, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS, jnp.int32), caches, chunk=chunk)
