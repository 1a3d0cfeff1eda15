"""Every measured number, by the part it measures. Imported only by jobs."""
