"""Conversations to samples, and samples to packed batches."""
