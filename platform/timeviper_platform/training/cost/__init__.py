"""Estimates FLOPs, memory and data mixture before a run starts."""
