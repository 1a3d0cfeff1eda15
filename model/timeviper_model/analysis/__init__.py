"""Measurements for the paper's figures."""
