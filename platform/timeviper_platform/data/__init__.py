"""From media to the feature store, and from annotations to samples."""
