"""Answers to scores, tables and a report."""
