"""Weight folders in the Hugging Face layout, and each model family in it."""
