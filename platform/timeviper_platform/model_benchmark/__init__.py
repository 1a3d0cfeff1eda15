"""The `model` suite: scan, prefill, video prefix, decoding and generation of narrow models with the paper's pattern."""
