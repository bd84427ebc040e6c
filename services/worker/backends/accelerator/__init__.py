"""Compute on accelerators: batched operations over a small set of kernels that differ by vendor."""
