"""Preprocessing compared with its ideal and with other pipelines."""
