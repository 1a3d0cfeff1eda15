"""Feature store and samples to weights: pack plan, feed, DeepSpeed step, checkpoints."""
