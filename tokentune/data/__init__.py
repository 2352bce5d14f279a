"""From files and the hub to batches of tokens: prompts, packing, collators. Nothing about models."""
