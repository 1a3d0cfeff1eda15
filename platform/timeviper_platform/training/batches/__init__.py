"""Turns samples into packed micro-batches."""
