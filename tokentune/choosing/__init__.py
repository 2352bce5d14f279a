"""How a draw is made: exact probabilities, a strategy from a file, a size that changes over the run."""
