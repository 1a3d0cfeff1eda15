"""Generated corpora whose truth is exact."""
