"""Captions to verdicts of a judge, another language model behind an OpenAI-compatible endpoint."""
