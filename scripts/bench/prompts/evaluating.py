"""Losses of answers, row by row, and which of them greedy decoding would give.

B rows of a batch, S tokens, n positions at which some row has a loss, V vocabulary
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tokentune.data.collators import CausalCollator
from tokentune.sampling.sampler import IGNORED_LABEL, target_mask

Found = dict[str, list]  # "loss_sums" in nats, "tokens", "exact" (0 or 1), of each row


@torch.no_grad()
def evaluate(model: nn.Module, rows: list[dict], pad_token_id: int, batch: int = 16) -> Found:
    """The model in evaluation mode, computed in bfloat16 as in training, on rows of "input_ids" and "labels".

    A row is exact where each token of its answer, the EOS included, is the most probable one after those before it:
    greedy decoding of the prompt then gives this answer. It is known without a generation.
    """
    was_training, collate = model.training, CausalCollator(pad_token_id)
    model.eval()
    found: Found = {name: [0] * len(rows) for name in ("loss_sums", "tokens", "exact")}
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        whole = collate([rows[number] for number in numbers])
        targets = target_mask(whole["labels"], causal=True)  # (B, S)
        columns = targets.any(0).nonzero().flatten()  # (n,)
        with torch.autocast("cpu", torch.bfloat16):
            inputs = {name: whole[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, logits_to_keep=columns).logits.float()  # (B, n, V)
        labels = whole["labels"].roll(-1, 1).masked_fill(~targets, IGNORED_LABEL)[:, columns]  # (B, n)
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)).all(1)
        counts = (labels != IGNORED_LABEL).sum(1)
        for number, *values in zip(numbers, losses.sum(1).tolist(), counts.tolist(), right.tolist(), strict=True):
            loss, tokens, exact = values
            found["loss_sums"][number], found["tokens"][number] = round(loss, 5), tokens
            found["exact"][number] = int(exact)
    model.train(was_training)
    return found


def loss_of(found: Found) -> float:
    """Nats per answer token, over all rows."""
    return sum(found["loss_sums"]) / sum(found["tokens"])
