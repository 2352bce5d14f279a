"""Tensors that autograd saves for the backward pass: counted, told by kind of module, moved to the CPU's memory."""
