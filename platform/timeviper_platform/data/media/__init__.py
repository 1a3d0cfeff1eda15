"""Where the bytes of a medium are, and what its headers say."""
