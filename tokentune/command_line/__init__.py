"""The flags, in groups, each with its check."""
