"""Probing and decoding in a child process that may be killed."""
