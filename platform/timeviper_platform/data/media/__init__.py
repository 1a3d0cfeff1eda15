"""Opens media and reads their headers."""
