"""Measurements of the model on a CPU."""
