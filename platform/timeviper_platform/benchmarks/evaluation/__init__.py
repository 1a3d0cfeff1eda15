"""Measurements of evaluation on a CPU."""
