"""Tensor operations and kernels."""
