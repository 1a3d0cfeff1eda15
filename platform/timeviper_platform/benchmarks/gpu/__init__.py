"""Measurements of a CUDA device, without Ray."""
