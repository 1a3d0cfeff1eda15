"""From sampling times to frames."""
