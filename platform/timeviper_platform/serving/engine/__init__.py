"""From requests to tokens, one engine a replica."""
