"""From frames to features, and the recipe that names them."""
