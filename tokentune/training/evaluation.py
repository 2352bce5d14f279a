"""The validation loss of a causal model: per supervised token, by the full forward pass, the logits in chunks.

    B sequences, S tokens, V vocabulary

One batch's logits (B, S, V) in float32 can take more memory than the model: 16 GiB for 8 x 4,096 tokens of 128,256
words. Where a model's head can be called on a part of the rows (`core/loss.py`), which is tried on a few tokens first,
only one chunk of logits exists at a time, and none of tokens without a loss.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from tokentune.core.compat.fsdp import runs_together
from tokentune.core.layers import inner_model
from tokentune.core.loss import CHUNK_BYTES, put_chunked_loss
from tokentune.sampling.sampler import IGNORED_LABEL

logger = logging.getLogger(__name__)
_TRIED_TOKENS = 16
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of both ways; rows of 16-bit logits are rounded by their number


def loss_per_token(trainer: Trainer, loader: DataLoader) -> dict[str, float]:
    """`Evaluation` of a causal language model: "loss", nats per supervised token.

    The Trainer's own loop averages the batches' means, which weighs a short answer's tokens more than a long one's.
    """
    device, model = trainer.args.device, trainer.model
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    totals = torch.zeros(2, dtype=wide, device=device)
    in_chunks = None
    for batch in loader:
        if in_chunks is None:  # of split weights each process would call the head another number of times
            in_chunks = not runs_together(model) and can_be_chunked(model, batch["input_ids"])
        labels = batch["labels"]
        tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
        with loss_in_chunks(model, labels, tokens) if in_chunks else nullcontext():
            loss = model(**batch).loss.to(wide)
        if tokens:  # the mean over none is no number
            totals += torch.stack([loss * tokens, loss.new_tensor(tokens)])
    loss_sum, tokens = trainer.accelerator.reduce(totals, "sum").tolist()
    return {"loss": loss_sum / tokens}


@contextmanager
def loss_in_chunks(
    model: nn.Module, labels: Tensor, num_supervised: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[None]:
    """Within it, one call of the model without gradients takes its loss a chunk of rows at a time.

    Args:
        model: of which `can_be_chunked` said yes.
        labels: (B, S), those of the call.
        num_supervised: how many of labels[:, 1:] are.
        chunk_bytes: most bytes of a chunk's logits in float32.
    """
    with ExitStack() as undo:
        put_chunked_loss(undo, inner_model(model), labels, num_supervised, chunk_bytes)
        yield


def can_be_chunked(model: nn.Module, input_ids: Tensor) -> bool:
    """Whether the loss of this model, in the mode that it is in, is the same in chunks; tried on a few of (B, S)."""
    core = inner_model(model)
    if not core.can_generate() or core.get_output_embeddings() is None or core.loss_function is not ForCausalLMLoss:
        return False
    ids = input_ids[:1, :_TRIED_TOKENS]
    if ids.shape[1] < 2:
        return False
    whole = model(input_ids=ids, labels=ids).loss
    try:
        with loss_in_chunks(model, ids, ids.shape[1] - 1, chunk_bytes=1):  # one row a chunk
            parts = model(input_ids=ids, labels=ids).loss
    except (ValueError, RuntimeError, TypeError, IndexError) as error:  # models' code on logits of no rows
        logger.info("the validation holds all logits of a batch: %s needs them all (%s)", type(core).__name__, error)
        return False
    same = torch.allclose(parts, whole, rtol=_CLOSE.get(next(core.parameters()).dtype, 2e-2), atol=0)
    if not same:
        logger.info("the validation holds all logits of a batch: in chunks the loss of %s differs", type(core).__name__)
    return same
