"""Several processes: engines, peers that end together, interruptions."""
