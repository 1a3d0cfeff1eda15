"""Raw answers to scores, without a model."""
