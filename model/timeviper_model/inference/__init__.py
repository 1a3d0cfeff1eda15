"""Prefill, decoding and continuous batching."""
