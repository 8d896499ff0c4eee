"""Floor 6: measuring."""
