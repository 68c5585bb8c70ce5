"""Launch parameters of the kernels: explicit, else tuned for this device, else a heuristic."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeParams:
    """How decode attention is launched.

    Attributes:
        splits: blocks that share the tokens of one KV head, each its own run of whole tiles.
    """

    splits: int


TARGET_BLOCKS = 132 * 5 * 3


def decode_params(*, heads: int, rows: int) -> DecodeParams:
    """Launch parameters from static shapes alone.

    Args:
        heads: sequences times KV heads.
        rows: packed rows per sequence.
    """
    tiles = max(1, -(-rows // 128))
    return DecodeParams(splits=max(1, min(tiles, TARGET_BLOCKS // heads)))
