"""From features and samples to trained weights: a run, its phases and its steps."""
