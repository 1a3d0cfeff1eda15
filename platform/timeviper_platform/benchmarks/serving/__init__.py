"""Measurements of the HTTP endpoint, with random weights and a Ray of its own."""
