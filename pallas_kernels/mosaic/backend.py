"""What the Mosaic GPU kernels do for the library, and what they cannot."""

import functools

from mustafar_jax.backend import Attended, Backend, Operation, missing_from_jax
from mustafar_jax.operands import PackedAttention

# The kernels are imported where they are used: Pallas takes a while to import, and a version of jax may lack a part.


def _why_not_attend(operands: PackedAttention) -> str | None:
    for module in ("jax.experimental.pallas.mosaic_gpu", "jax.experimental.mosaic.gpu"):
        if reason := missing_from_jax(module):
            return reason
    from mustafar_jax.pallas_kernels.mosaic import codes, lowering
    from mustafar_jax.pallas_kernels.mosaic.decode_attention import BOTH_DENSE
    from mustafar_jax.pallas_kernels.rows import is_dense, why_not_attend

    if reason := why_not_attend(operands, lowering.why_not, codes.KEYS, codes.WHOLE):
        return reason
    return BOTH_DENSE if is_dense(operands.key) and is_dense(operands.value) else None


def attend(operands: PackedAttention, *, interpret: bool = False) -> Attended:
    """Attend a packed cache; `interpret` runs the kernel as numpy, anywhere."""
    from mustafar_jax.pallas_kernels.mosaic.decode_attention import decode_attention
    from mustafar_jax.pallas_kernels.rows import by_queries

    return by_queries(functools.partial(decode_attention, interpret=interpret), operands)


MOSAIC_GPU = Backend(name="mosaic_gpu", needs_cuda=True, attend_packed=Operation(attend, _why_not_attend))
