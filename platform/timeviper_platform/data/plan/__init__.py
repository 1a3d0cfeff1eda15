"""Plans media as segments of 64 frames, and stores the plan."""
