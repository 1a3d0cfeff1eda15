"""Video decoding compared with other strategies."""
