"""Floor 7: one thin command per file."""
