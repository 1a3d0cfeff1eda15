"""The `training` suite: fill of packs, cost of steps, checkpoints and data, time to recover."""
