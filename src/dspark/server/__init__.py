"""Floor 6: the engine behind the OpenAI API."""
