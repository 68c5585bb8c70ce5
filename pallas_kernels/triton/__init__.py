"""Kernels that Pallas lowers through Triton, for NVIDIA GPUs of compute capability 8.0 or later."""
