"""An exact rival for long sequences: both passes take a chunk of the sequence at a time, over a key-value cache.

    B sequences, S tokens, G key-value heads, d head size; chunks of tokens a to b

The idea of SeCO (arXiv 2505.16710), in its plainest form:

    forward     all chunks in order, without gradients, fill the cache: each layer's keys and values, 2 x (B, G, S, d)
    backward    from the last chunk to the first: the chunk runs again, with gradients, over the cached keys and values
                of the tokens in front of it, which are leaves. Its own keys and values get the gradients that later
                chunks left for them; what reaches the leaves is left for earlier ones

Activations and logits are of one chunk, the cache and its gradients of the whole sequence. The gradient is that of
ordinary training; the layers run forward twice, as in gradient checkpointing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class ChunkedStep:
    """A training step without padding; made by its forward pass. `backward` adds to the parameters' gradients.

    Args:
        ids, labels: (B, S); -100 where there is no loss. The loss is the mean over the labels.
        length: tokens of a chunk.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, labels: Tensor, length: int):
        self.model, self.ids = model, ids
        self.labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # of the output at each position
        self.chunks = [(a, min(a + length, ids.shape[1])) for a in range(0, ids.shape[1], length)]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for a, b in self.chunks:
                model.model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True)
        self.cached = [(layer.keys, layer.values) for layer in cache.layers]
        self.kept_bytes = sum(tensor.nbytes for pair in self.cached for tensor in pair)

    def backward(self) -> None:
        left = [tuple(torch.zeros_like(tensor) for tensor in pair) for pair in self.cached]  # for the keys and values
        count = (self.labels != -100).sum()
        for a, b in reversed(self.chunks):
            cache, leaves = DynamicCache(config=self.model.config), []
            for number, pair in enumerate(self.cached):
                if a > 0:
                    leaves.append(tuple(tensor[:, :, :a].detach().requires_grad_() for tensor in pair))
                    cache.update(*leaves[-1], number)
            hidden = self.model.model(input_ids=self.ids[:, a:b], past_key_values=cache, use_cache=True)[0]
            logits = self.model.lm_head(hidden).flatten(0, 1).float()
            loss = F.cross_entropy(logits, self.labels[:, a:b].flatten(), reduction="sum") / count
            own = [tensor[:, :, a:b] for layer in cache.layers for tensor in (layer.keys, layer.values)]
            due = [tensor[:, :, a:b] for pair in left for tensor in pair]
            # Keys and values of a model whose weights are frozen up to them have no gradient.
            paths = [(tensor, gradient) for tensor, gradient in zip(own, due, strict=True) if tensor.requires_grad]
            torch.autograd.backward([loss, *(t for t, _ in paths)], [None, *(g for _, g in paths)])
            for pair, gradients in zip(leaves, left, strict=False):
                for leaf, gradient in zip(pair, gradients, strict=True):
                    gradient[:, :, :a] += leaf.grad
