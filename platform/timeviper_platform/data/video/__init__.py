"""From times to frames: `frames` holds the values, `sampling` the one clock."""
