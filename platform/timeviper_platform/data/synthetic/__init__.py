"""Generated corpora with exact ground truth."""
