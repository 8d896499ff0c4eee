"""Floor 5: serve requests."""
