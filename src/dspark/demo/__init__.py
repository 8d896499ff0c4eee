"""Floor 6: the embedded default, how it was made, and the race that shows it."""
