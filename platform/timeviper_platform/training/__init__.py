"""Trains models: runs, phases and steps."""
