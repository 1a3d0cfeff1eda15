"""Parameter groups, learning-rate schedule and the DeepSpeed engine."""
