"""Attention of one group of tokens over all tokens: kernels, masks, and the gradient's correction."""
