"""How the entries of stored rows are coded: `PLAIN` numbers of the cache's dtype, or codes of fewer bits."""

from mustafar_jax.codecs.codec import Codec
from mustafar_jax.codecs.eight_bits import EightBits
from mustafar_jax.codecs.plain import PLAIN, Plain

BY_BITS: dict[int, Codec] = {16: PLAIN, 8: EightBits()}
"""The codecs that a config names by their bits; 16 stands for the cache's own dtype."""

__all__ = ["BY_BITS", "PLAIN", "Codec", "EightBits", "Plain", "check_bits"]


def check_bits(name: str, bits: object) -> None:
    """Raise ValueError for bits that there is no codec of."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BY_BITS:
        raise ValueError(f"{name}={bits!r} must be one of {list(BY_BITS)}")
