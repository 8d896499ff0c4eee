"""Floor 3: what proposes tokens, and its checkpoint formats."""
