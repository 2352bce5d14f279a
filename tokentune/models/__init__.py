"""Checkpoints, adapters and tasks: from a name to a model that can be trained. Nothing about data."""
