"""Blocks of the model and their caches."""
