"""Published annotations to training samples."""
