"""Features on disk: layout, reading, writing, committing, verifying."""
