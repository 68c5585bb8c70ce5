"""Attention, packing and products in plain JAX: what every other backend is tested against."""
