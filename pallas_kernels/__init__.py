"""Pallas kernels for packed KV caches; imported as `mustafar_jax.pallas_kernels`.

Prune and pack, the sparse matrix-vector products with packed keys and values, and decode attention. This package
depends on jax alone; the XLA functions in `mustafar_jax` are the reference that every kernel here is tested against.
"""
