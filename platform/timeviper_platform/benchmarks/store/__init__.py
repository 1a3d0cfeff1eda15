"""Measurements of the feature store."""
