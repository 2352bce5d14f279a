"""Batches of `answers+q`: padded, packed, and of encoders, with the fillers of rows whose padding does not suffice."""

from collections.abc import Callable, Sequence

import pytest
import torch
from family_check import Float64
from packed_models import gemma, llama
from torch import Tensor, nn

from tokentune import apply_tokentune
from tokentune.data.collators import CausalCollator, ClassificationCollator, EncoderDraw, SeededRows
from tokentune.data.packing import PackedCollator
from tokentune.sampling.sampler import target_mask
from tokentune.sampling.schedule import Answers

PAD = 7


def row(length: int, supervised: int, seed: int) -> dict[str, list[int]]:
    ids = torch.randint(8, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [-100] * (length - supervised) + ids[length - supervised :]}


def examples(shapes: Sequence[tuple[int, int]]) -> list[dict]:
    data = SeededRows([row(*shape, seed) for seed, shape in enumerate(shapes)], seed=5)
    return [data[number] for number in range(len(shapes))]


SHAPES = [(14, 10), (14, 2), (9, 3), (14, 0), (6, 1), (14, 1)]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_padded_batch(share: float) -> None:
    collator, rows = CausalCollator(PAD, Answers(share)), examples(SHAPES)
    batch, plain = collator(rows), CausalCollator(PAD)(rows)
    targets = target_mask(plain["labels"], causal=True)
    assert torch.equal(batch["labels"], plain["labels"])  # no loss is dropped
    assert batch["num_supervised"] == targets.sum()
    own = [max(1, s + int(share * (n - s) + 0.5)) for n, s in SHAPES]
    assert batch["selected_positions"].shape == batch["selection_fillers"].shape == (6, max(own))
    assert [int(count) for count in collator.count(batch)] == [sum(n for n, _ in SHAPES), sum(own), targets.sum()]
    for number, example in enumerate(rows):
        alone = collator([example])
        assert "selection_fillers" not in alone
        real = batch["attention_mask"][number][batch["selected_positions"][number]].bool()
        real &= ~batch["selection_fillers"][number]
        assert alone["selected_positions"][0].tolist() == batch["selected_positions"][number][real].tolist()


def test_no_fillers_where_padding_suffices() -> None:
    batch = CausalCollator(PAD, Answers(), pad_to_multiple_of=32)(examples(SHAPES))
    assert "selection_fillers" not in batch and batch["selected_positions"].shape == (6, 10)


def gradients(model: nn.Module, batches: list[dict]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        with Float64():
            model(**batch, num_items_in_batch=10).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [llama, gemma])
@pytest.mark.parametrize(
    ("size", "correction"), [(Answers(), 0.0), (Answers(0.3), 0.0), (Answers(0.3), 1.0), (0.5, 1.0), (3, 1.0)]
)
def test_packed_documents_have_the_gradients_of_each_alone(
    size: Answers | float, correction: float, build: Callable[[], nn.Module]
) -> None:
    model = apply_tokentune(build().double().train(), chunked_loss=False, gradient_correction=correction)
    documents = CausalCollator(PAD, size, independent=correction > 0)
    rows = examples(SHAPES)
    collator = PackedCollator(documents)
    batch = collator([{"documents": rows[:3]}, {"documents": rows[3:]}])
    assert batch["input_ids"].shape == (2, 37)  # the longer row: 14 + 14 + 9
    assert ("selection_fillers" in batch) == (size != 0.5)  # there the shorter row's padding suffices
    assert ("selection_probabilities" in batch) == (correction > 0)
    assert ("selection_weights" in batch) == (not isinstance(size, Answers))
    alone = [documents([example]) for example in rows]
    counts = [int(sum(counts)) for counts in zip(*map(documents.count, alone), strict=True)]
    assert [int(count) for count in collator.count(batch)] == counts
    assert batch["num_supervised"] == sum(of_one["num_supervised"] for of_one in alone)
    found, expected = gradients(model, [batch]), gradients(model, alone)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-12 * value.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("in_place", [False, True])
def test_token_labels_of_an_encoder(in_place: bool) -> None:
    rows = examples([(8, 6), (8, 1), (8, 0)])

    def pad(items: list[dict]) -> dict[str, Tensor]:
        batch = {name: torch.tensor([item[name] for item in items]) for name in ("input_ids", "labels")}
        return batch | {"attention_mask": torch.ones_like(batch["labels"])}

    collator = ClassificationCollator(pad, EncoderDraw(Answers(0.5), in_place=in_place))
    batch = collator(rows)
    own = [6 + 1, 1 + 4, 4]
    assert batch["selected_positions"].shape == (3, 7)
    assert (~batch["selection_fillers"]).sum(1).tolist() == own
    assert (batch["labels"] != -100).sum(1).tolist() == [6, 1, 0]
    assert [int(count) for count in collator.count(batch)] == [24, sum(own), 7]
