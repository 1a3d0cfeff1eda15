"""Measurements of the HTTP endpoint, with random weights and a private Ray."""
