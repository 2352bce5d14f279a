"""Whether a model keeps the documents of a packed row apart: tested before training.

A tiny random copy of the model (`verify/tiny_copy.py`), patched if the model is, runs in float64 on two packed rows,
one of them padded, and on the same documents in rows of their own: outputs and gradients have to agree. They do not
where a family counts positions by itself, makes its own masks, or mixes tokens outside of attention.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.compat.rotary_state import rotary_state_kept
from tokentune.core.layers import inner_model
from tokentune.core.patched import settings_of
from tokentune.core.patching import patched
from tokentune.data.collators import CausalCollator
from tokentune.data.packing import PackedCollator, real_tokens
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.verify.tiny_copy import Float64, tiny_copy, undisturbed

# Kernels that take a mask. FlashAttention takes none, and recognises several documents only in a batch of one row.
SEPARATING = ("sdpa", "eager", "flex_attention")
TOLERANCE = 1e-9  # relative, in float64
LENGTHS = (9, 7, 11, 4)  # of documents: longer and shorter than the tiny copy's windows of 5 tokens
PROPORTION = 0.4  # selected, where the model is patched


def check_separation(model: nn.Module) -> None:
    """Refuses a model that computes something else for a document in a packed row than for the document alone.

    Args:
        model: with its adapters, and patched if it is to be; its weights are not used.

    Raises:
        UserError: how much differs, or why it cannot be tested.
    """
    owner = inner_model(model)
    name, kernels = type(owner).__name__, owner.config._attn_implementation
    if kernels not in SEPARATING:
        raise UserError(
            f"--packing: attention by {kernels} takes no mask that could keep documents apart: "
            "take --attn_implementation sdpa"
        )
    settings = settings_of(owner)
    with undisturbed():
        try:
            tiny = tiny_copy(owner)
            error = _difference(tiny, None)
            if settings is not None:
                with patched(tiny, profile=settings.profile, chunked_loss=False):
                    error = max(error, _difference(tiny, PROPORTION))
        except UnsupportedModelError as reason:
            raise UserError(f"--packing: {reason}. Leave --packing out.") from reason
        except Exception as reason:  # a family's own code may raise anything on positions that it does not expect
            what = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
            raise UserError(f"--packing: {name} fails on packed rows ({what}). Leave --packing out.") from reason
    if not error <= TOLERANCE:  # also where it is NaN
        raise UserError(
            f"--packing: {name} does not keep the documents of a row apart: with others beside it, what it makes of "
            f"one changes by {error:.0e} (relative). Leave --packing out."
        )


def _difference(tiny: nn.Module, prefix_length: float | None) -> float:
    """The largest relative error of outputs and gradients, packed against alone."""
    vocabulary = tiny.config.get_text_config().vocab_size
    documents = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, vocabulary, (length,)).tolist()
        documents.append({"input_ids": ids, "labels": ids, "draw_seed": number})
    collator = CausalCollator(pad_token_id=0, prefix_length=prefix_length)
    packed = PackedCollator(collator)([{"documents": documents[:3]}, {"documents": documents[3:]}])
    found = _outputs_and_gradients(tiny, [packed])
    expected = _outputs_and_gradients(tiny, [collator([document]) for document in documents])
    if found.keys() != expected.keys():
        return float("inf")
    scale = max(value.abs().max() for name, value in expected.items() if name != "outputs")
    errors = []
    for name, value in expected.items():
        floor = 1e-9 if name == "outputs" else 1e-3 * float(scale)
        errors.append((found[name] - value).abs().max() / value.abs().max().clamp(min=floor))
    return float(torch.stack(errors).max())


def _outputs_and_gradients(tiny: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Logits of all documents' tokens, or of the selected ones, and the gradients of a weighted sum of them."""
    tiny.zero_grad(set_to_none=True)
    outputs = []
    for batch in batches:
        mask, positions = batch.get("attention_mask"), batch.get("selected_positions")
        tokens = real_tokens(batch["position_ids"]) if mask is None else mask.sum(1)
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_supervised")}
        with Float64(), rotary_state_kept(tiny):  # a longer document before would change a dynamic rotary embedding
            logits = tiny(**inputs).logits
        if positions is None:
            positions = torch.arange(logits.shape[1]).expand(logits.shape[:2])
        elif logits.shape[1] != positions.shape[1]:
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[2]))
        outputs += [row[own < n] for row, own, n in zip(logits, positions, tokens, strict=True)]
    joined = torch.cat(outputs)  # (tokens, V)
    (joined * torch.linspace(-1, 1, joined.shape[1], dtype=joined.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in tiny.named_parameters() if p.grad is not None}
    return {"outputs": joined.detach()} | gradients
