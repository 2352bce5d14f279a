"""The flags of the commands as groups of typed settings, each with its check."""
