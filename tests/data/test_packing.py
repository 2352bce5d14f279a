"""Several documents in one row, and padding on either side: the gradients of the documents one by one."""

from collections.abc import Callable

import oracle
import pytest
import torch
from packed_models import gemma, llama, mistral
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
)

import tokentune.core.model_sampling
from tokentune import apply_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.sampling.sampler import Selection

LENGTHS = (13, 6, 9)
TOTAL = sum(LENGTHS)


def documents() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each: token ids (1, N), labels with a prompt of two tokens, and selected positions (1, K)."""
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, 90, (1, length))
        labels = ids.masked_fill(torch.arange(length) < 2, -100)
        positions = torch.rand(1, length - 1).topk(length // 3).indices.sort(1).values
        found.append((ids, labels, positions))
    return found


def one_by_one(model: nn.Module, texts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle's loss and gradients: documents in forward passes of their own, the mean over all selected targets."""
    total, losses = 0, []
    for ids, labels, positions in texts:
        with oracle.constants_outside(model, positions, oracle.LLAMA):
            logits = model(ids).logits
        targets = sum(int(labels[0, t + 1] != -100) for t in positions[0].tolist() if t + 1 < ids.shape[1])
        if targets:
            losses.append(targets * oracle.next_token_loss(logits, labels, positions))
        total += targets
    loss = torch.stack(losses).sum() / total
    return loss.detach(), oracle.gradients(model, loss)


def assert_same(model: nn.Module, loss: Tensor, expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    found = oracle.gradients(model, loss)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert found.keys() == expected[1].keys()
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (found[name] - gradient).abs().max() / max(gradient.abs().max(), 1e-3 * scale)
        assert error < 1e-5, f"{name}: {error:.1e}"  # float64, but for the casts of norms and of the loss


def packed(texts: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """One row (1, TOTAL). A document's last token does not predict the next one's first: that has no label."""
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    return {
        "input_ids": torch.cat([ids for ids, _, _ in texts], 1),
        "labels": torch.cat([labels for _, labels, _ in texts], 1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "selected_positions": torch.cat([p + start for (_, _, p), start in zip(texts, starts, strict=True)], 1),
    }


@pytest.mark.parametrize("build", [llama, mistral, gemma])
def test_packed_documents_are_the_documents_one_by_one(build: Callable) -> None:
    model, texts = build().double().train(), documents()
    expected = one_by_one(model, texts)
    apply_tokentune(model)
    inputs = packed(texts)
    assert_same(model, model(**inputs).loss, expected)
    del inputs["position_ids"]  # then it is one document, and everything is different
    assert abs(model(**inputs).loss.item() - expected[0].item()) > 1e-4


def test_packed_rows_of_a_batch_have_boundaries_of_their_own() -> None:
    model = llama().double().train()
    first, second = documents(), documents()[::-1]
    expected = one_by_one(model, first + second)
    apply_tokentune(model)
    one = packed(first)
    two = {name: torch.cat([value]) for name, value in one.items()}
    two["input_ids"], two["labels"] = (torch.cat([text[n] for text in second], 1) for n in (0, 1))
    lengths = LENGTHS[::-1]
    two["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = (0, lengths[0], lengths[0] + lengths[1])
    two["selected_positions"] = torch.cat([p + s for (_, _, p), s in zip(second, starts, strict=True)], 1)
    both = {name: torch.cat([one[name], two[name]]) for name in one}
    assert_same(model, model(**both).loss, expected)


def test_a_flattening_collators_batch_with_the_models_own_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' padding-free batches: no attention mask, separators without a label, positions that restart."""
    model = apply_tokentune(llama().double().train(), 0.4)
    texts = documents()
    rows = [{"input_ids": ids[0].tolist(), "labels": labels[0].tolist()} for ids, labels, _ in texts]
    batch = DataCollatorWithFlattening(return_tensors="pt")(rows)
    drawn, select = [], tokentune.core.model_sampling.select_tokens
    monkeypatch.setattr(
        tokentune.core.model_sampling,
        "select_tokens",
        lambda *a, **k: Selection(drawn.append(select(*a, **k).positions) or drawn[-1]),
    )
    loss = model(**batch).loss
    assert drawn[0].shape == (1, round(0.4 * TOTAL))
    start, redrawn = 0, []
    for (ids, labels, _), length in zip(texts, LENGTHS, strict=True):
        inside = (drawn[0] >= start) & (drawn[0] < start + length)
        redrawn.append((ids, labels, drawn[0][inside][None] - start))
        start += length
    assert_same(model, loss, one_by_one(model, redrawn))


@pytest.mark.parametrize("build", [llama, mistral, gemma])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_documents_are_the_documents_one_by_one(side: str, build: Callable) -> None:
    model, texts = build().double().train(), documents()
    expected = one_by_one(model, texts)
    apply_tokentune(model)
    longest, most = max(LENGTHS), max(LENGTHS) // 3
    rows = {"input_ids": [], "labels": [], "attention_mask": [], "selected_positions": []}
    for ids, labels, positions in texts:
        padding = longest - ids.shape[1]
        where = (padding, 0) if side == "left" else (0, padding)
        rows["input_ids"].append(nn.functional.pad(ids, where, value=7))
        rows["labels"].append(nn.functional.pad(labels, where, value=-100))
        rows["attention_mask"].append(nn.functional.pad(torch.ones_like(ids), where))
        # Filled up to the batch's common size with padding positions, as `select_positions` does.
        real = set((positions[0] + where[0]).tolist())
        filling = [t for t in range(longest) if rows["attention_mask"][-1][0, t] == 0][: most - len(real)]
        rows["selected_positions"].append(torch.tensor([sorted(real | set(filling))]))
    assert_same(model, model(**{name: torch.cat(value) for name, value in rows.items()}).loss, expected)


def test_packing_keeps_the_savings() -> None:
    """The mask of documents is made for one group's rows at a time, and costs no more than a causal one."""
    model = apply_tokentune(llama(hidden_size=64, intermediate_size=128, num_hidden_layers=3).train())
    ids, positions = torch.randint(3, 90, (1, 96)), torch.arange(0, 96, 4)[None]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(96)[None] % 24}
    with SavedForBackward(model) as saved:
        model(**inputs, selected_positions=positions)
    with SavedForBackward(model) as full:
        model(**inputs)
    assert saved.bytes < 0.5 * full.bytes, saved.bytes / full.bytes
