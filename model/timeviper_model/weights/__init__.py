"""Weights folders in Hugging Face layout."""
