"""Requests to tokens, with one engine per replica."""
