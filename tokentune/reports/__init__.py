"""What a run leaves for people to read: summaries, curves, model cards, uploads. Nothing that trains."""
