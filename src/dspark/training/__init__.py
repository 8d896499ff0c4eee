"""Floor 5: train drafters."""
