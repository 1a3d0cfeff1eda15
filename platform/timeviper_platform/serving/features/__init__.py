"""Uploaded or stored media to features."""
