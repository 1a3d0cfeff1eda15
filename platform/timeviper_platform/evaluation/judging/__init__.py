"""Captions to verdicts of a judge, a language model at an OpenAI-compatible endpoint."""
