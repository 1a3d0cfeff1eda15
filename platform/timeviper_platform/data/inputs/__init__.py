"""What a user points at, as media items."""
