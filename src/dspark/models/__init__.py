"""Floor 2: any Hugging Face causal LM as target, on one ragged batch over paged keys and values."""
