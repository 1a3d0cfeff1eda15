"""A step's numbers: files, charts, trackers and log lines."""
