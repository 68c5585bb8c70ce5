"""Prune and pack: from dense keys and values to the packed layout in one pass, written into the cache in place.

`kernel.py` goes through the steps. Entries are loaded and ranked (`ranking.py`, `mean.py`), the largest ones selected
(`selection.py`), then appended in shared memory and stored (`storing.py`). `program.py` says which thread has what.
"""

from mustafar_jax.pallas_kernels.triton.prune_pack.kernel import prune_pack
from mustafar_jax.pallas_kernels.triton.prune_pack.program import Prune

__all__ = ["Prune", "prune_pack"]
