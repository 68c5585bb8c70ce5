"""Pallas kernels for packed KV caches; imported as `mustafar_jax.pallas_kernels`.

Prune and pack, the sparse matrix-vector products with packed keys and values, and decode attention. Of the library they
need what they are given (`operands`), and what that is made of. `backends.xla` is the reference that every kernel here
is tested against.
"""
