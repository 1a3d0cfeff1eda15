"""Numbers and pictures of the paper's figures."""
