"""From samples to micro-batches."""
