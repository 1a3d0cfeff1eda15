"""From uploaded or stored media to features."""
