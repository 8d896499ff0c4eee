"""Floor 6: the embedded default, its tokenizer and weights, and how they were made."""
