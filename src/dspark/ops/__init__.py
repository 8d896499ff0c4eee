"""Floor 1: tensor functions, each with a plain torch version that is its specification."""
