"""Records the metrics of each step: files, charts, trackers and log lines."""
