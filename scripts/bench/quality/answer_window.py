"""A strategy of one's own, for `--selection answer_window.py:answer_window`: a window inside of the answer.

What `supervised` does, tokens with a loss alone, and what `contiguous` does, neighbours that see one another's
gradients. For rows with one answer, padded on the right.

    B sequences, S tokens
"""

import torch
from torch import Tensor

from tokentune.sampling.strategies import Tokens


def answer_window(tokens: Tokens) -> Tensor:
    """(B, S): true in a window that begins anywhere in the answer and fits; else in the last tokens up to its end."""
    place = torch.arange(tokens.real.shape[1], device=tokens.real.device)  # (S)
    targets = tokens.targets.long()
    first = targets.argmax(-1, keepdim=True)  # (B, 1)
    end = (targets * place).argmax(-1, keepdim=True) + 1
    count = tokens.counts.unsqueeze(-1)
    room = (end - count - first).clamp(min=0)
    turn = (tokens.uniform[:, :1] * (room + 1)).long()
    start = torch.minimum(first, (end - count).clamp(min=0)) + turn
    return (place >= start) & (place < start + count)
