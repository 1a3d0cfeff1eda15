"""Prompts to answers: the engine, and generate() for one prompt."""
