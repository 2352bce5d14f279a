"""The memory of a run: estimated without weights, tried before training, reported after it. Nothing that trains."""
