"""How the entries of stored rows are coded: `PLAIN` numbers of the cache's dtype, or codes of fewer bits."""

import numpy as np

from mustafar_jax.codecs.codec import Codec
from mustafar_jax.codecs.magnitudes import SignMagnitude
from mustafar_jax.codecs.plain import PLAIN, Plain
from mustafar_jax.codecs.scaled import ScaledCodec
from mustafar_jax.codecs.uniform import Uniform

WHOLE: dict[int, Codec] = {16: PLAIN} | {bits: Uniform(bits) for bits in (8, 4, 3, 2)}
"""The codecs of rows that hold every entry, by the bits that a config names; 16 stands for the cache's own dtype."""

PRUNED: dict[int, Codec] = {16: PLAIN, 8: Uniform(8), 4: SignMagnitude()}
"""Those of rows that hold what a bitmap names."""

__all__ = ["PLAIN", "PRUNED", "WHOLE", "Codec", "Plain", "ScaledCodec", "SignMagnitude", "Uniform", "codec_of"]


def codec_of(name: str, bits: object, *, pruned: bool) -> Codec:
    """The codec of an argument `name`=bits.

    Raises ValueError for bits that there is no codec of for such rows, TypeError for what is no integer.
    """
    offered = PRUNED if pruned else WHOLE
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise TypeError(f"{name}={bits!r} must be an integer, one of {list(offered)}")
    if bits not in offered:
        rows = "where entries are pruned" if pruned else "where every entry is held"
        raise ValueError(f"{name}={bits!r} must be one of {list(offered)} {rows}")
    return offered[int(bits)]
