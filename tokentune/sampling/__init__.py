"""Which tokens of a sequence are selected: strategies, probabilities, draws. Nothing about models' layers."""
