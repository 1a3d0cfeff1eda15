"""The `decode` suite: sampling against other libraries, every strategy at its best, very long files."""
