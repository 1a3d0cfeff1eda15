"""Resumable training state, and weights exported from it."""
