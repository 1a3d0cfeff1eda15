"""Probes and decodes in a child process that can be killed."""
