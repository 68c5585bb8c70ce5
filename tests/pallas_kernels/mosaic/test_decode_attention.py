"""What is special to decode attention through Mosaic GPU; the rest is in test_decode_attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.operands import Mean
from mustafar_jax.pallas_kernels.mosaic import decode_attention as kernels
from mustafar_jax.pallas_kernels.mosaic.launch import MosaicParams
from mustafar_jax.pallas_kernels.mosaic.scatter import Guess
from tests.helpers import rope_frequencies
from tests.pallas_kernels.data import (
    attend,
    coded_format,
    everywhere,
    masks,
    merge_splits,
    pack_rows,
    rows_of,
    specs,
    with_mean,
)
from tests.pallas_kernels.test_decode_attention import check

BF16, F16 = jnp.bfloat16, jnp.float16


def edge_counts(slots, words):
    """Entries in each word of full rows on and beside the edges of what `Guess` takes for usual."""
    guess = Guess.of(slots, words)
    outer = [guess.least - 1, guess.least, guess.most, guess.most + 1]
    if words == 2:
        return [(first, slots - first) for first in [*outer, slots - 32, slots // 2] if slots - 32 <= first <= 32]
    pairs = [(first, max(1, guess.pair - first + more)) for first in outer for more in (-1, 0, 5)]
    pairs += [((guess.pair + guess.most) // 2, 0), (0, slots // 4)]
    rests = [slots - first - second for first, second in pairs]
    return [(*pair, rest // 2, rest - rest // 2) for pair, rest in zip(pairs, rests, strict=True)]


def edge_masks(rng, slots, words):
    """Rows of `edge_counts`, each also turned round."""
    both = [counts[::order] for counts in edge_counts(slots, words) for order in (1, -1)]
    return np.array([np.concatenate([rng.permutation(32) < count for count in counts]) for counts in both])


@pytest.mark.parametrize(
    ("slots", "words", "interpret"), everywhere([(40, 4), (64, 4), (20, 2), (32, 2)], [(40, 4), (32, 2)])
)
def test_masks_on_the_edge_of_the_usual(slots, words, interpret):
    rng = np.random.default_rng(slots)
    # a unit goes the way that suits all of its rows, so all of a unit's rows have one mask
    masks = np.repeat(edge_masks(rng, slots, words), 32, axis=0)[None, None]
    shape = masks.shape
    key, value = (jnp.asarray(rng.standard_normal(shape), F16) for _ in range(2))
    query = jnp.asarray(rng.standard_normal((1, 1, 1, shape[3])), F16)
    (key, dense_key), (value, dense_value) = (pack_rows(x, masks) for x in (key, value))
    first, last = jnp.zeros(1, jnp.int32), jnp.full(1, shape[2], jnp.int32)
    options = {"scale": shape[3] ** -0.5, "params": MosaicParams(splits=2, warps=4), "interpret": interpret}
    call = jax.jit(functools.partial(kernels.attend_rows, **options))
    actual = merge_splits(query, *call(query, key, value, first, last))
    check(actual, attend(query, dense_key, dense_value, first, last, options["scale"]), F16)


GROWING = [(1, 64, 16), (4, 128, 16), (16, 128, 16), (4, 128, 4), (2, 128, 16), (6, 64, 16), (9, 64, 2)]


@pytest.mark.parametrize(
    ("group", "head_dim", "bits", "centred", "interpret"),
    everywhere(
        [(*case, centred) for case in GROWING for centred in (False, True)],
        [(1, 64, 16, False), (16, 128, 16, True), (4, 128, 4, True)],
    ),
)
def test_scores_that_grow_rescale_what_is_summed_up(group, head_dim, bits, centred, interpret):
    """A warp takes several units, each of which has scores far above all those before."""
    rng = np.random.default_rng(group)
    shape = (1, 1, 288, head_dim)
    growth = np.exp(np.linspace(0, 3.2, shape[2]))[:, None]
    key, value = rng.standard_normal(shape) * growth, rng.standard_normal(shape)
    query = jnp.asarray(rng.standard_normal((1, 1, group, head_dim)), F16)
    first, last = jnp.zeros(1, jnp.int32), jnp.full(1, shape[2], jnp.int32)
    if bits < 16:
        forms = (coded_format(head_dim, F16, bits, pairs) for pairs in ("channels", "tokens"))
        key, value = (form.pack(jnp.asarray(x, F16)) for form, x in zip(forms, (key, value), strict=True))
        dense_key, dense_value = (x.to_array() for x in (key, value))
    else:
        (key, dense_key), (value, dense_value) = (
            pack_rows(jnp.asarray(x, F16), masks(rng, jnp.asarray(x, F16), 20, ["magnitude"])) for x in (key, value)
        )
    mean = None
    if centred:
        mean = Mean(jnp.asarray(rng.standard_normal((1, 1, head_dim)), jnp.float32), rope_frequencies(head_dim), 4)
        dense_key = with_mean(np.asarray(dense_key), mean)
    options = {"scale": head_dim**-0.5, "mean": mean, "params": MosaicParams(splits=1), "interpret": interpret}
    call = jax.jit(functools.partial(kernels.attend_rows, **options))
    actual = merge_splits(query, *call(query, key, value, first, last))
    check(actual, attend(query, dense_key, dense_value, first, last, options["scale"]), F16)


FAR = [(1, 4, 128, 5e5), (1, 12, 64, 1e4), (4, 4, 128, 5e5), (8, 12, 128, 1e4), (16, 4, 128, 5e5)]
FAR += [(2, 4, 128, 1e4), (3, 12, 64, 1e4), (9, 4, 64, 10)]


@pytest.mark.parametrize(("group", "warps", "head_dim", "theta", "interpret"), everywhere(FAR, [FAR[1], FAR[2]]))
def test_centred_keys_far_into_a_sequence(group, warps, head_dim, theta, interpret):
    """Warps share 9 units of one sequence, and 3 of another, so that some have none.

    A fourth of a mean's pairs are fast, or half of them; of the last, all.
    """
    rng = np.random.default_rng(group)
    shape = (2, 1, 320, head_dim)
    query = jnp.asarray(rng.standard_normal((*shape[:2], group, head_dim)), F16)
    first, last = jnp.array([37, 70], jnp.int32), jnp.array([300, 130], jnp.int32)
    (key, dense_key), (value, dense_value) = (rows_of(rng, shape, F16, 0.7) for _ in range(2))
    inv_freq = rope_frequencies(head_dim, theta)
    mean = Mean(jnp.asarray(rng.standard_normal((*shape[:2], head_dim)), jnp.float32), inv_freq, 3000)
    options = {"scale": head_dim**-0.5, "mean": mean, "params": MosaicParams(1, warps), "interpret": interpret}
    call = jax.jit(functools.partial(kernels.attend_rows, **options))
    actual = merge_splits(query, *call(query, key, value, first, last))
    check(actual, attend(query, with_mean(dense_key, mean), dense_value, first, last, options["scale"]), F16)


def test_wants_one_side_packed():
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(NotImplementedError, match="both are ordinary arrays"):
        jax.eval_shape(
            functools.partial(kernels.attend_rows, scale=0.1), *specs(1, 1, 1, 64, 128, 0, 0, BF16), lengths, lengths
        )


def test_says_when_a_block_is_too_large():
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = functools.partial(kernels.attend_rows, scale=0.1, params=MosaicParams(1, warps=28))
    with pytest.raises(ValueError, match="fewer warps"):
        jax.eval_shape(call, *specs(1, 1, 16, 64, 128, 40, 40, BF16), lengths, lengths)
