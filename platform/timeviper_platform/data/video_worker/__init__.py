"""Probing and decoding in a process that may be killed."""
