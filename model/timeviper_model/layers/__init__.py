"""The blocks of the model, with their caches."""
