"""From a base and its adapters to one checkpoint. Nothing that trains."""
