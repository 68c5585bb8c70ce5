"""What command lines take."""

import argparse
import math


def parse_size(text: str) -> float:
    """Bytes of a size such as 80GB, 79.6GiB or 24e9."""
    units = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    number = text.rstrip("kMGTiB")
    try:
        size = float(number) * units[text[len(number) :]]
    except (ValueError, KeyError):
        size = math.nan
    if not 1e6 <= size < math.inf:  # less is a unit that was forgotten
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted one such as 80GB, 79.6GiB or 24e9")
    return size


def parse_count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; wanted a whole number of at least 1")
    return count


def parse_seed(text: str) -> int:
    """A seed of random numbers, of which generators take 32 bits: jax drops those beyond in silence."""
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; wanted a whole number in 0 .. 2**32 - 1")
    return seed
