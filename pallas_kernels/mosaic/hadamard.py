"""`mustafar_jax.rotation` on a warp's registers: signs, and butterflies within lanes and between them."""

from collections.abc import Sequence

from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp
from mustafar_jax.rotation import SIGNS

_SIGN = 2**31


def turn(w: Warp, x: Sequence[Register]) -> list[Register]:
    """Rotate a vector, of which each lane has as many neighbouring channels; float32."""
    return _transformed(w, _signed(w, x, w.lane() * len(x)), 32)


def turn_back(w: Warp, x: Sequence[Register], lanes: int) -> list[Register]:
    """The inverse of `turn`, of vectors that so many lanes share."""
    return _signed(w, _transformed(w, x, lanes), (w.lane() & (lanes - 1)) * len(x))


def _signed(w: Warp, x: Sequence[Register], first: Register) -> list[Register]:
    """Channels from `first` on times their signs, as `rotation.signs` has them."""
    signs = [(first + i) * SIGNS & _SIGN for i in range(len(x))]
    return [w.as_float(w.as_bits(y) ^ sign) for y, sign in zip(x, signs, strict=True)]


def _transformed(w: Warp, x: Sequence[Register], lanes: int) -> list[Register]:
    """The orthonormal Hadamard transform: for each bit of the channel's number a sum and a difference."""
    x = [y * (len(x) * lanes) ** -0.5 for y in x]
    distance = 1
    while distance < len(x):
        x = [x[i ^ distance] - x[i] if i & distance else x[i] + x[i ^ distance] for i in range(len(x))]
        distance *= 2
    distance = 1
    while distance < lanes:
        own = w.select((w.lane() & distance) > 0, w.number(-1), w.number(1))
        x = [w.fused(y, own, w.shuffle(y, w.lane() ^ distance)) for y in x]
        distance *= 2
    return x
