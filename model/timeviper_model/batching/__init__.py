"""From conversations and samples to packed tensors."""
