"""HTTP to requests, and tokens to responses."""
