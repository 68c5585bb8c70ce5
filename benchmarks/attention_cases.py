"""What `benchmarks.attention` times: shapes, caches, and implementations on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import mustafar_jax as mj
from benchmarks.synthetic import Shape

RULES: dict[str, Callable[[float, float], mj.CompressionConfig]] = {
    "published": mj.CompressionConfig,
    "recommended": mj.CompressionConfig.recommended,
}
CODES: dict[str, mj.CompressionConfig] = {
    "fast": mj.CompressionConfig.preset("fast"),
    "balanced": mj.CompressionConfig.preset("balanced"),
    "small": mj.CompressionConfig.preset("small"),
    "4 bits": mj.CompressionConfig(0, 0, k_bits=4, v_bits=4, residual_length=0, rotate_keys=True, rotate_values=True),
    "8 bits": mj.CompressionConfig(0, 0, k_bits=8, v_bits=8, residual_length=0, rotate_keys=True, rotate_values=True),
}
"""Configs whose rows are codes: presets, and codes alone, with neither centred keys nor a dense window."""
PUBLISHED_KERNELS = {("A", 0.7): 379.0, ("B", 0.7): 1427.0, ("A", 0.5): 470.0, ("B", 0.5): 1768.0}
"""Microseconds that the paper's CUDA kernels take for both products on an H100, by shape and sparsity."""

A, B = Shape("A", 8, 32, 1, 4096), Shape("B", 8, 8, 4, 16384)
SETS: dict[str, list[Shape]] = {
    "A": [A],
    "B": [B],
    "heads": [dataclasses.replace(B, name=f"B, group {group}", group=group) for group in (1, 8, 16)],
    "context": [Shape(f"1 x {tokens}", 1, 8, 4, tokens) for tokens in (1024, 4096, 16384, 65536, 131072)],
    "C": [Shape("C", 16, 8, 4, 16384, 64)],
    "batch": [Shape(f"{batch} x 8192", batch, 8, 4, 8192) for batch in (2, 8, 32)],
    "tiny": [Shape("tiny", 2, 2, 2, 256, 32)],
}
"""Names of sets of shapes; "tiny" is for trying the program where there is no GPU."""
SWEPT = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def config_of(rule: str, sparsity: float) -> mj.CompressionConfig:
    """The cache of a rule at a sparsity, dense at 0; or of codes, which have a sparsity of their own."""
    if rule in CODES:
        return CODES[rule]
    return RULES[rule](sparsity, sparsity) if sparsity else mj.CompressionConfig(0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: an implementation on caches of one kind.

    Of rule "dense" are dense caches, with lengths or not; a rule is a name in `RULES`, with a sparsity, or in `CODES`.
    """

    shape: Shape
    rule: str
    sparsity: float
    implementation: str
    lengths: bool = True

    @property
    def config(self) -> mj.CompressionConfig:
        """The cache's."""
        return config_of(self.rule, self.sparsity)

    def attend(self, query: jax.Array, cache: mj.LayerCache) -> jax.Array:
        """One call: [B, N, H]."""
        if self.lengths:
            return mj.decode_attention(query, cache, implementation=self.implementation)
        assert isinstance(cache, mj.cache.DenseCache)
        options: dict[str, Any] = {"implementation": self.implementation}
        return jax.nn.dot_product_attention(query[:, None], cache.key, cache.value, **options)[:, 0]

    @property
    def name(self) -> str:
        """Of a row, with its mask unless that is random."""
        if self.rule in CODES:
            return f"{self.rule}, {self.implementation}"
        if not self.sparsity:
            shown = "cuDNN" if self.implementation == "cudnn" else self.implementation
            return f"dense, {shown}" + ", lengths" * self.lengths
        return f"{self.rule} {self.sparsity}, {self.implementation}"
