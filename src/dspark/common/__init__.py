"""Floor 0: errors, configuration, logging, random streams, chat rendering."""
