"""Weights and a benchmark to scores."""
