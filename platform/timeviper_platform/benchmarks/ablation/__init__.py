"""Measures the effect of TransV on synthetic corpora."""
