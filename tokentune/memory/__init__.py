"""What a run takes of memory: estimated before, tried before training, reported after it."""
