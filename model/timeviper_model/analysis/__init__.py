"""The measurements behind the paper's Figures 3 to 6, for any model."""
