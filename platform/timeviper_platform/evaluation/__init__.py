"""Weights and held-out questions to scores, always beside the same model without the video."""
