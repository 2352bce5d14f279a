"""Models of the core tests in float64, their batches, and what the definition of the method finds for them."""

import oracle
import torch
from conftest import tiny_bert_config, tiny_llama_config
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
)

BATCH, LENGTH = 3, 11
TOLERANCE = 1e-12
CASES = {
    "llama": (LlamaForCausalLM, tiny_llama_config, oracle.LLAMA),
    "llama-bare": (LlamaModel, tiny_llama_config, oracle.LLAMA),
    "bert-bare": (BertModel, tiny_bert_config, oracle.BERT),
    "bert-masked-lm": (BertForMaskedLM, tiny_bert_config, oracle.BERT),
    "bert-classes": (BertForSequenceClassification, tiny_bert_config, oracle.BERT),
    "bert-tokens": (BertForTokenClassification, tiny_bert_config, oracle.BERT),
}


class Norm64(nn.Module):
    """A root-mean-square norm that stays in float64, where the Llama's own casts to float32 and would hide errors."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def loss64(logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor | None = None, **_) -> Tensor:
    """transformers' causal loss without its cast to float32."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())


def build(name: str, attention: str = "sdpa", **changes: object) -> nn.Module:
    cls, config, _ = CASES[name]
    model = cls._from_config(config(**changes), attn_implementation=attention).double().train()
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, child_name, Norm64(child.weight))
    if name == "llama":
        model.loss_function = loss64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(side: str = "right") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, S), with one full row, one short and one very short."""
    ids = torch.randint(3, 90, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        if padding:
            mask[row, slice(LENGTH - padding, None) if side == "right" else slice(0, padding)] = 0
    return ids, mask


def draw(count: int, first: bool) -> Tensor:
    """`count` positions per row, padding included (a batch's common size needs it); the first where it is pooled."""
    scores = torch.rand(BATCH, LENGTH)
    scores[:, 0] += 2.0 * first
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def rows(tensor: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([tensor[b, positions[b]] for b in range(len(positions))])


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        # Key biases cancel in the softmax: their gradient is rounding noise around zero, measured against the others.
        error = (found[name] - expected[name]).abs().max() / max(expected[name].abs().max(), 1e-3 * scale)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def definition(name: str, model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor):
    """What the independent oracle finds: output rows, loss, and the labels that the model is to be called with."""
    with oracle.constants_outside(model, positions, CASES[name][2]):
        out = model(ids, attention_mask=mask)
    if name.endswith("bare"):
        output = rows(out.last_hidden_state, positions)
        return output, projection(output, mask, positions), None
    if name == "bert-classes":
        labels = torch.tensor([0, 1, 1])
        return out.logits, nn.functional.cross_entropy(out.logits, labels), labels
    output = rows(out.logits, positions)
    if name == "llama":
        labels = ids.masked_fill(mask.cumsum(1) <= 2, -100)  # a prompt of two tokens, and padding before it
        labels = labels.masked_fill(mask == 0, -100)
        return output, oracle.next_token_loss(out.logits, labels, positions), labels
    labels = (ids % model.config.num_labels).masked_fill(mask == 0, -100)
    chosen = rows(labels[..., None], positions).flatten()
    return output, nn.functional.cross_entropy(output.flatten(0, 1), chosen), labels


def projection(output: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """A loss for a model without a head: a fixed projection of the real tokens' rows (B, K, D)."""
    weights = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view(output.shape[1:])
    return (output * weights * rows(mask[..., None], positions)).sum()


def call(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor | None, positions: Tensor):
    """Output rows and loss of the patched model."""
    if labels is None:
        output = model(ids, attention_mask=mask, selected_positions=positions).last_hidden_state
        return output, projection(output, mask, positions)
    found = model(ids, attention_mask=mask, labels=labels, selected_positions=positions)
    return found.logits, found.loss
