"""A run from its settings to its end: trainer parts, checkpoints, resuming, records of it."""
