"""Kernels that Pallas lowers through Mosaic GPU, for Hopper GPUs (compute capability 9.0)."""
