"""Scores and figures for weights."""
