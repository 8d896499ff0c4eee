"""Floor 6: planning fleets on paper."""
