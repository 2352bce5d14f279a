"""What a run takes of memory: estimated without weights, tried before training, reported after it."""
