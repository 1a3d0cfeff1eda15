"""From HTTP to requests, and from tokens to responses."""
