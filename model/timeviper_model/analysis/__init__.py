"""Measurements for the paper's Figures 3 to 6."""
