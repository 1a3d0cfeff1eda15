"""Loss and answers on held-out samples."""
