"""The cluster side of TimeViper: preprocessing, training, serving and evaluation on Ray."""

__version__ = "0.2.0"
"""Version of both packages; pyproject.toml reads it from here."""
