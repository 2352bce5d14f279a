"""The method: layers run on two groups of tokens, of which one keeps gradients. Nothing about files, flags or runs."""
