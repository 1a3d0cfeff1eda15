"""What TransV is worth on synthetic corpora."""
