"""What a run leaves for people: summaries, model cards, uploads."""
