"""From media to segments of 64 frames, stored and compared with what is committed."""
