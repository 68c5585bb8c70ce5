"""What a mean key is at each row."""

import jax.numpy as jnp
import numpy as np
import pytest

from mustafar_jax.layout import WORD
from mustafar_jax.operands import Mean
from tests.helpers import mean_at, rope_frequencies


def mean(head_dim, theta, offset=4):
    key = np.random.default_rng(0).standard_normal((2, 3, head_dim))
    return Mean(jnp.asarray(key, jnp.float32), rope_frequencies(head_dim, theta), offset)


@pytest.mark.parametrize(
    ("head_dim", "theta", "pairs"),
    [(128, 5e5, 16), (128, 1e6, 16), (128, 1e4, 32), (64, 1e5, 16), (64, 1e4, 16), (32, 1e4, 16), (128, 10, 64)],
)
def test_pairs_that_turn_far_within_a_group_are_fast(head_dim, theta, pairs):
    found = mean(head_dim, theta)
    assert found.fast_pairs == pairs
    assert (found.inv_freq[pairs:] * WORD / 2 < 0.65).all()


def test_no_frequency_is_fast_where_all_are_zero():
    assert Mean(jnp.zeros((1, 1, 128)), np.zeros(64, np.float32), 0).fast_pairs == 16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_is_rotated_to_rows_or_to_the_middle_of_their_group(head_dim):
    of, rows = mean(head_dim, 5e5), np.arange(3000, 3070)
    found = np.asarray(of.at(jnp.asarray(of.offset + rows)[None]))
    np.testing.assert_allclose(found, mean_at(of, rows), atol=1e-4)
    slow = found[..., of.fast_pairs : head_dim // 2]
    assert (slow[:, :, 8:40] == slow[:, :, 8:9]).all()  # rows 3008 to 3039
    assert (found[:, :, 8] != found[:, :, 9]).any()


@pytest.mark.parametrize("first", [0, 32, 64, 4, 68])
def test_places_of_a_tile_are_a_base_and_places_from_its_start(first):
    """As kernels have it: rows of one tile, whose first is a multiple of 32 or of 4, that carry nothing."""
    of, rows = mean(128, 5e5), np.array([0, 1, 2, 3, 8, 16, 27])
    whole = of.places(320 + first + rows)
    np.testing.assert_array_equal(whole, of.bases(np.array(320 + first)) + of.places(rows))


def test_adds_little_to_what_is_left_of_keys():
    """Keys whose mean has as much energy as what is left of them, which that adds a hundredth to at most."""
    of, rows = mean(128, 5e5), np.arange(320)
    off = np.asarray(of.at(jnp.asarray(of.offset + rows)[None])) - every_pair(of, rows)
    assert (off**2).mean() < 0.01 * np.mean(np.asarray(of.key) ** 2)


def every_pair(of, rows):
    """The mean rotated to rows, slow pairs too."""
    angle = (of.offset + rows)[:, None] * of.inv_freq
    low, high = np.split(np.asarray(of.key)[:, :, None], 2, axis=-1)
    turned = low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)
    return np.concatenate(turned, axis=-1)
