"""Codes of a few bits: the levels, the scale, rows that are not ordinary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mustafar_jax as mj
from mustafar_jax import rotation
from mustafar_jax.codecs import PRUNED, WHOLE
from mustafar_jax.layout import from_lanes
from tests.helpers import DTYPES, adversarial, exhaustive, magnitude_mask, pack, unpack

KINDS = [(bits, False) for bits in WHOLE if bits < 16] + [(bits, True) for bits in PRUNED if bits < 16]
FEW = [(8, False), (4, False), (2, False), (4, True)]
EVERY_KIND = pytest.mark.parametrize(
    ("bits", "masked"), [*FEW, *exhaustive(*(kind for kind in KINDS if kind not in FEW))]
)


def levels_of(bits, masked):
    """All levels, in ascending order."""
    codec = (PRUNED if masked else WHOLE)[bits]
    return np.sort(np.asarray(codec.level(jnp.arange(2**bits, dtype=jnp.uint8)), np.float64))


def scales_of(rows):
    """float64 [..., S]."""
    return np.asarray(from_lanes(rows.scale), np.float64)[..., : rows.length]


def packed(x, bits, masked, sparsity=0.7):
    """Rows, and the mask of what they hold."""
    if not masked:
        return pack(x, bits=bits), np.ones(x.shape, bool)
    mask = magnitude_mask(x, sparsity)
    return pack(x, mask, slots=20, bits=bits), np.asarray(mask)


def test_levels():
    np.testing.assert_array_equal(levels_of(2, False), [-1.5, -0.5, 0.5, 1.5])
    np.testing.assert_array_equal(levels_of(3, False), np.arange(-3.5, 4))
    np.testing.assert_array_equal(levels_of(4, False), np.arange(-7.5, 8))
    for masked in (False, True):
        np.testing.assert_array_equal(levels_of(8, masked), np.arange(-127.5, 128))
    magnitudes = np.array([0.5, 1, 1.5, 2, 3, 4, 6, 8])
    np.testing.assert_array_equal(levels_of(4, True), np.sort([*magnitudes, *-magnitudes]))
    codes = np.arange(8, dtype=np.uint16)
    np.testing.assert_array_equal(((codes + 1) << 9).view(np.float16).astype(float) * 2**14, magnitudes)


@EVERY_KIND
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES))
def test_levels_are_in_the_entries_order_and_keep_a_rows_length(bits, masked, seed, dtype):
    """Of rows with few and with many entries, small, large and skewed ones."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-5, 5, (2, 40, 1)))
    x = jnp.asarray(rng.standard_normal((2, 40, 64)) * sizes * rng.choice([1, 3], (1, 1, 64)), dtype)
    rows, mask = packed(x, bits, masked)
    held, kept = np.asarray(unpack(rows)), np.where(mask, x, 0).astype(np.float64)
    assert held.dtype == np.float32
    assert not held[~mask].any()
    order = np.argsort(kept, axis=-1, stable=True)
    assert (np.diff(np.take_along_axis(held, order, axis=-1), axis=-1) >= 0).all()
    np.testing.assert_allclose((held * kept).sum(axis=-1), (kept**2).sum(axis=-1), rtol=2**-8)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_row_that_levels_fit_badly_is_not_blown_up(bits):
    """One large entry among small ones: the levels of these would be as large, were its length kept."""
    x = 1e-3 * jax.random.normal(jax.random.key(4), (32, 64)).at[:, 5].set(1e3)
    error = np.asarray(((unpack(pack(x, bits=bits)) - x) ** 2).sum(axis=-1) / (x**2).sum(axis=-1))
    assert (error < 1.05).all()


@EVERY_KIND
def test_unpacked_entries_are_level_times_scale_exactly(bits, masked):
    rows, mask = packed(jnp.asarray(np.random.default_rng(0).standard_normal((3, 33, 64)), jnp.bfloat16), bits, masked)
    held = np.asarray(unpack(rows)).astype(np.float64)
    exact = levels_of(bits, masked) * scales_of(rows)[..., None, None]
    assert (held[..., None] == exact).any(axis=-1)[mask].all()


@pytest.mark.parametrize(("bits", "masked"), [(bits, masked) for bits, masked in KINDS if bits < 8])
def test_the_codes_are_as_good_as_the_best_of_many(bits, masked):
    """The share of a row that is not along its levels lies near that of the best of a hundred scales."""
    x = jax.random.normal(jax.random.key(0), (96, 64)) * jnp.exp(jax.random.normal(jax.random.key(1), (96, 1)))
    rows, mask = packed(x, bits, masked)
    kept = np.where(mask, x, 0).astype(np.float64)
    levels, largest = levels_of(bits, masked), np.abs(kept).max(axis=-1)
    trials = largest / levels[-1] * np.linspace(0.3, 1.1, 100)[:, None]
    nearest = np.abs(levels * trials[..., None, None] - kept[None, ..., None]).argmin(axis=-1)

    def lost(y):
        return 1 - (y * kept).sum(axis=-1) ** 2 / (y**2).sum(axis=-1) / (kept**2).sum(axis=-1)

    best = lost(np.where(mask, levels[nearest], 0)).min(axis=0)
    assert lost(np.asarray(unpack(rows), np.float64)).mean() <= 1.15 * best.mean() + 1e-5


def test_errors_that_matter_more_are_smaller():
    """An entry with a larger weight comes out closer to what it was."""
    x = jax.random.normal(jax.random.key(2), (512, 64))
    mask = magnitude_mask(x, 0.5)
    weight = jnp.where(jnp.arange(64) < 8, 1.0, 0.05)
    codec = PRUNED[4]
    off = [
        np.where(mask, codec.decode(*codec.encode(x, np.dtype(np.float32), mask, given)) - x, 0)[:, :8]
        for given in (None, weight)
    ]
    assert (off[1] ** 2).sum() < 0.9 * (off[0] ** 2).sum()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, *exhaustive(jnp.float32)])
@EVERY_KIND
def test_rows_that_are_not_ordinary(bits, masked, dtype):
    """Zeros, one entry, the largest numbers; NaN and infinity, which make their own row not finite and no other."""
    x = np.zeros((8, 64), np.float32)
    x[1, 7], x[2, :16], x[3, 0], x[4, 5] = -3, float(jnp.finfo(dtype).max), np.nan, -np.inf
    x[5:] = np.random.default_rng(0).standard_normal((3, 64))
    x = jnp.asarray(x, dtype)
    rows = pack(x, x != 0, slots=64, bits=bits) if masked else pack(x, bits=bits)
    held, scale = np.asarray(unpack(rows)), scales_of(rows)
    assert scale[0] == 0
    assert not held[0].any()
    if masked or bits == 8:  # fewer levels are spent on the zeros beside what there is
        np.testing.assert_allclose(held[1, 7], -3, rtol=0.01)
        np.testing.assert_allclose(held[2, :16], np.asarray(x[2, :16], np.float32), rtol=0.01)
    assert not np.isfinite(scale[3:5]).any()
    assert not np.isfinite(held[3, 0])
    assert not np.isfinite(held[4, 5])
    others = [0, 1, 2, 5, 6, 7]
    assert np.isfinite(scale[others]).all()
    assert np.isfinite(held[others]).all()


@EVERY_KIND
def test_a_row_does_not_depend_on_the_others(bits, masked):
    x = adversarial(np.random.default_rng(1), (64, 64), jnp.bfloat16)
    whole, _ = packed(x, bits, masked)
    alone = [unpack(packed(x[i : i + 1], bits, masked)[0]) for i in range(0, 64, 7)]
    np.testing.assert_array_equal(unpack(whole)[::7], jnp.concatenate(alone))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_bytes(bits):
    """The bits of each entry and two bytes a row; behind a bitmap, that and a flag."""
    x = jnp.ones((2, 3, 64, 128), jnp.bfloat16)
    assert pack(x, bits=bits).nbytes == (128 * bits // 8 + 2) * x.size // 128
    if bits in PRUNED:
        mask = magnitude_mask(x, 0.7)
        assert (
            pack(x, mask, slots=mj.keep_count(128, 0.7), bits=bits).nbytes
            == (40 * bits // 8 + 2 + 16) * x.size // 128 + 6
        )


@pytest.mark.parametrize(
    ("message", "x", "options"),
    [
        (r"bits=5 must be one of \[16, 8, 4, 3, 2\] where every entry is held", (4, 64), {"bits": 5}),
        (r"bits=2 must be one of \[16, 8, 4\] where entries", (4, 64), {"bits": 2, "mask": np.ones((4, 64), bool)}),
        (r"bits='8' must be an integer, one of", (4, 64), {"bits": "8"}),
        (r"bits=True must be an integer", (4, 64), {"bits": True}),
        ("slots=8 wants a mask", (4, 64), {"bits": 8, "slots": 8}),
        ("x has head_dim 48; wanted a multiple of 32", (4, 48), {"bits": 4}),
    ],
)
def test_bad_arguments(message, x, options):
    with pytest.raises((ValueError, TypeError), match=message):
        mj.pack(jnp.ones(x), **options)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_a_rotation_keeps_products_and_is_undone(head_dim):
    x, y = jax.random.normal(jax.random.key(0), (2, 50, head_dim))
    np.testing.assert_allclose(rotation.turn_back(rotation.turn(x)), x, atol=1e-5)
    products = np.einsum("ih,jh->ij", x, y), np.einsum("ih,jh->ij", rotation.turn(x), rotation.turn(y))
    np.testing.assert_allclose(products[1], products[0], atol=1e-4)
    turning = rotation.matrix(head_dim)
    size = head_dim & -head_dim
    np.testing.assert_allclose(np.abs(turning[turning != 0]), size**-0.5, rtol=1e-6)
    assert (turning != 0).sum() == head_dim * size
    halves = [(turning[:, channel] > 0).sum() for channel in range(head_dim)]
    assert min(halves) > 0
    assert max(halves) < size


def test_a_rotation_of_what_is_not_finite_or_too_large():
    """Its own vector becomes NaN, and no other."""
    x = np.ones((4, 64), np.float32)
    x[1, 3], x[2, 5] = np.inf, 1e38
    turned = np.asarray(rotation.turn(jnp.asarray(x)))
    assert np.isnan(turned[1:3]).all()
    assert np.isfinite(turned[[0, 3]]).all()
    x[2] = 4e37
    assert np.isfinite(rotation.turn(jnp.asarray(x))[2]).all()


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("rotate", [False, True])
def test_what_a_rotation_is_for(bits, rotate):
    """Rows with one large channel lose less where they are turned first."""
    x = jax.random.normal(jax.random.key(3), (256, 64)).at[:, 5].multiply(20)
    held = unpack(pack(rotation.turn(x) if rotate else x, bits=bits))
    held = rotation.turn_back(held) if rotate else held
    error = float(((held - x) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())
    assert (error < {4: 0.012, 2: 0.14}[bits]) == rotate
