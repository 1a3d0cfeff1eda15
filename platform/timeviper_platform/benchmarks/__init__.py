"""Every measured number, by the part it measures. Imported by jobs alone."""
