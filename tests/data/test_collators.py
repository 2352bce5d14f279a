"""Padding by length, the draw within a batch, and the same draws however the rows are batched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from instruction_rows import TEMPLATE, load
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from tokentune.core.profile import Pooling
from tokentune.data.collators import CausalCollator, ClassificationCollator, EncoderDraw, SeededRows, stack_images
from tokentune.data.packing import PackedCollator
from tokentune.sampling.sampler import selected_count, target_mask
from tokentune.sampling.strategies import REGISTRY, Choice, Tokens, strategy, strategy_names
from tokentune.sampling.weighted_draw import inclusion_probabilities, systematic_draw

PAD = 3


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    """Rows of 2 to 40 tokens, the last fifth of each supervised (at least one token); 3 is a token as well as PAD."""
    made = []
    for row in range(count):
        length = 2 + (row * 17) % 39
        ids = [3 + (row + i) % 7 for i in range(length)]
        prompt = min(length - 1, length * 4 // 5)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def drawn(loader: DataLoader, data: list[dict]) -> dict[tuple[int, ...], tuple[list[int], list[int]]]:
    """Row -> the real positions selected in it and the labels left in it."""
    found = {}
    for batch in loader:
        for ids, mask, labels, positions in zip(
            *(batch[k] for k in ("input_ids", "attention_mask", "labels", "selected_positions")), strict=True
        ):
            length = int(mask.sum())
            row = next(i for i, example in enumerate(data) if example["input_ids"] == ids[:length].tolist())
            found[row] = ([p for p in positions.tolist() if p < length], labels[:length].tolist())
    return found


def test_padding_is_told_by_length() -> None:
    examples = [{"input_ids": [5, 3, 3], "labels": [-100, 3, 3]}, {"input_ids": [4], "labels": [-100]}]
    batch = CausalCollator(PAD)(examples)
    assert batch["input_ids"].tolist() == [[5, 3, 3], [4, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 3, 3], [-100, -100, -100]]  # a real token equal to PAD keeps its label
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_pad_to_multiple_of() -> None:
    examples = [{**row, "draw_seed": i} for i, row in enumerate(rows(5))]
    plain = CausalCollator(PAD, prefix_length=0.5)(examples)
    longest = plain["input_ids"].shape[1]
    padded = CausalCollator(PAD, prefix_length=0.5, pad_to_multiple_of=64)(examples)
    assert padded["input_ids"].shape[1] == 64 > longest
    assert torch.equal(padded["labels"][:, :longest], plain["labels"])
    assert (padded["labels"][:, longest:] == -100).all()
    assert padded["selected_positions"].shape == plain["selected_positions"].shape


@pytest.mark.parametrize("prefix_length", [1, 5, 100, 0.1, 0.3, 1.0])
def test_selected_targets_alone_keep_their_labels(prefix_length: int | float) -> None:
    data = SeededRows(rows(), seed=1)
    examples = [data[i] for i in range(len(data))]
    batch = CausalCollator(PAD, prefix_length=prefix_length)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["selected_positions"].shape[1] == selected_count(prefix_length, max(lengths))
    for row, example in enumerate(examples):
        selected = set(batch["selected_positions"][row].tolist())
        kept = {t for t, label in enumerate(batch["labels"][row].tolist()) if label != -100}
        supervised = {t for t, label in enumerate(example["labels"]) if label != -100}
        assert kept == {t for t in supervised if t - 1 in selected}
        assert kept  # every row has something to learn
        assert len(selected & set(range(lengths[row]))) == selected_count(prefix_length, lengths[row])
        assert all(batch["labels"][row, t] == example["labels"][t] for t in kept)


def test_all_tokens_selected_is_ordinary_training() -> None:
    data = SeededRows(rows(), seed=1)
    examples = [data[i] for i in range(6)]
    assert torch.equal(
        CausalCollator(PAD, prefix_length=1.0)(examples)["labels"], CausalCollator(PAD)(examples)["labels"]
    )


def test_same_seed_same_draws_whatever_the_batches_and_workers() -> None:
    encoded = rows()
    data = SeededRows(encoded, seed=42)
    collator = CausalCollator(PAD, prefix_length=0.3)
    alone = drawn(DataLoader(data, batch_size=1, collate_fn=collator), encoded)
    assert len(alone) == len(encoded)
    batched = drawn(DataLoader(data, batch_size=7, collate_fn=collator), encoded)
    shuffled = drawn(
        DataLoader(data, 5, shuffle=True, collate_fn=collator, generator=torch.Generator().manual_seed(3)), encoded
    )
    with_workers = drawn(DataLoader(data, batch_size=4, collate_fn=collator, num_workers=2), encoded)
    assert alone == batched == shuffled == with_workers
    assert alone == drawn(DataLoader(SeededRows(rows(), seed=42), batch_size=3, collate_fn=collator), encoded)
    assert alone != drawn(DataLoader(SeededRows(rows(), seed=43), batch_size=3, collate_fn=collator), encoded)


def test_living_workers_see_the_new_epoch() -> None:
    data = SeededRows(rows(6), seed=42)
    loader = DataLoader(data, batch_size=3, collate_fn=list, num_workers=1, persistent_workers=True)
    here, there = [], []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        there.append([example["draw_seed"] for batch in loader for example in batch])
        here.append([data[row]["draw_seed"] for row in range(6)])
    assert there == here
    assert here[0] == here[2]
    assert not set(here[0]) & set(here[1])


def test_draw_seeds_differ_between_rows_epochs_and_seeds() -> None:
    seeds = set()
    for seed in (0, 42):
        data = SeededRows(rows(200), seed=seed)
        for epoch in range(3):
            data.set_epoch(epoch)
            seeds |= {data[row]["draw_seed"] for row in range(200)}
    assert len(seeds) == 2 * 3 * 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_each_epoch_selects_each_position_equally_often() -> None:
    """The whole path, seeds to positions: over 600 epochs every position of a row, 1 in 4 of them at a time."""
    data = SeededRows([{"input_ids": [5] * 40, "labels": [-100] + [5] * 39}], seed=42)
    collator = CausalCollator(PAD, prefix_length=10)
    counts = torch.zeros(40)
    for epoch in range(600):
        data.set_epoch(epoch)
        counts[collator([data[0]])["selected_positions"][0]] += 1
    statistic = ((counts - 150) ** 2 / 150).sum() / (1 - 10 / 40)  # positions of one draw exclude each other
    assert statistic < 72.1  # 39 degrees of freedom, 0.1 %


def test_a_selection_without_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="draw_seed"):
        CausalCollator(PAD, prefix_length=4)(rows(2))


def test_reference_strategy_reaches_the_draw() -> None:
    data = SeededRows(rows(), seed=1)
    batch = CausalCollator(PAD, prefix_length=4, strategy="reference")([data[i] for i in range(8)])
    assert (batch["selected_positions"][:, 0] == 0).all()
    for length, positions in zip(batch["attention_mask"].sum(-1), batch["selected_positions"].tolist(), strict=True):
        assert length - 1 in positions


def test_real_rows_have_a_supervised_token_in_every_draw(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "llama-tiny")
    name, words = str(shared / "data" / "alpaca_en.validation.jsonl"), "--max_length 256 --add_eos_token"
    encoded = load(name, words=words, tokenizer=tokenizer, template=TEMPLATE)
    report, data = encoded.train_report, SeededRows(encoded.train, seed=42)
    collator = CausalCollator(tokenizer.eos_token_id, prefix_length=0.05)
    batches = list(DataLoader(data, batch_size=16, collate_fn=collator))
    kept = torch.cat([(batch["labels"] != -100).sum(-1) for batch in batches])
    assert kept.shape == (report.rows,)
    assert kept.min() >= 1
    assert 0.04 < kept.sum() / report.supervised_tokens < 0.08


# ---- strategies that know their probabilities, and draws that are left to others -------------------------------------


@pytest.fixture
def first_half_more_often() -> Iterator[str]:
    """A strategy with probabilities: two tokens in three from the row's first half."""

    @strategy("first_half_more_often")
    def choose(tokens: Tokens) -> Choice:
        order, length = tokens.real.cumsum(-1), tokens.real.sum(-1, keepdim=True)
        share = torch.where(2 * order <= length, 2.0, 1.0).masked_fill(~tokens.real, 0.0)
        probability = inclusion_probabilities(share, tokens.counts)
        chosen = systematic_draw(probability, tokens.uniform, tokens.uniform[:, :1], tokens.real)
        return Choice(chosen + tokens.uniform, probability)

    yield "first_half_more_often"
    del REGISTRY["first_half_more_often"]


def test_weights_stand_for_the_labels_that_were_not_selected(first_half_more_often: str) -> None:
    data = SeededRows(rows(6), seed=1)
    examples = [data[i] for i in range(6)]
    collator = CausalCollator(PAD, prefix_length=0.5, strategy=first_half_more_often)
    batch = collator(examples)
    assert torch.equal(batch["labels"], CausalCollator(PAD)(examples)["labels"])  # which normalise the loss
    targets = target_mask(batch["labels"], causal=True).gather(1, batch["selected_positions"])
    assert batch["selection_weights"].shape == batch["selected_positions"].shape
    assert (batch["selection_weights"][~targets] == 0).all()
    assert batch["num_supervised"] == targets.sum() == collator.count(batch)[2]

    packed = PackedCollator(collator)
    joined = packed([{"documents": examples[:4]}, {"documents": examples[4:]}])
    assert joined["selection_weights"].shape == joined["selected_positions"].shape
    learnt = target_mask(joined["labels"], causal=True).gather(1, joined["selected_positions"])
    assert (joined["selection_weights"][~learnt] == 0).all()
    assert joined["selection_weights"].sum() == pytest.approx(float(batch["selection_weights"].sum()))
    assert joined["num_supervised"] == batch["num_supervised"] == packed.count(joined)[2]


@pytest.mark.parametrize("prefix_length", [5, 0.3])
def test_a_draw_that_is_left_to_others(prefix_length: int | float) -> None:
    data = SeededRows(rows(8), seed=1)
    examples = [data[i] for i in range(8)]
    now, later = (CausalCollator(PAD, prefix_length, draw_later=later) for later in (False, True))
    batch = later(examples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "selection_draws"}
    assert batch["selection_draws"].dtype == torch.float32
    assert torch.equal(batch["labels"], CausalCollator(PAD)(examples)["labels"])
    lengths = [len(example["input_ids"]) for example in examples]
    real, selected, supervised = (int(count) for count in later.count(batch))
    assert (real, selected) == (sum(lengths), sum(selected_count(prefix_length, length) for length in lengths))
    assert supervised == (batch["labels"][:, 1:] != -100).sum()
    drawn, expected = later.draw(batch, prefix_length), now(examples)
    assert set(drawn) == set(expected)
    assert all(torch.equal(torch.as_tensor(drawn[name]), torch.as_tensor(expected[name])) for name in drawn)


def test_scores_are_not_a_collator_s() -> None:
    with pytest.raises(ValueError, match="strategy 'gradient' needs scores, which a model has"):
        CausalCollator(PAD, prefix_length=4, strategy="gradient")
    with pytest.raises(ValueError, match="Did you mean random"):
        CausalCollator(PAD, prefix_length=4, strategy="randon")
    batch = CausalCollator(PAD, prefix_length=4, strategy="gradient", draw_later=True)([SeededRows(rows(1), 1)[0]])
    assert "selection_draws" in batch


@pytest.mark.parametrize("name", strategy_names(scored=False))
def test_every_strategy_draws_a_row_alike_in_every_batch(name: str) -> None:
    encoded = rows(10)
    data = SeededRows(encoded, seed=3)
    collator = CausalCollator(PAD, prefix_length=0.3, strategy=name)
    alone = drawn(DataLoader(data, batch_size=1, collate_fn=collator), encoded)
    assert alone == drawn(DataLoader(data, batch_size=6, collate_fn=collator), encoded)


# ---- encoders --------------------------------------------------------------------------------------------------------


def padded(examples: list[dict]) -> dict[str, torch.Tensor]:
    """What transformers' collators make, without a tokenizer."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for example in examples:
        rest = longest - len(example["input_ids"])
        batch["input_ids"].append(example["input_ids"] + [PAD] * rest)
        batch["attention_mask"].append([1] * (longest - rest) + [0] * rest)
        labels = example["labels"]
        batch["labels"].append(labels + [-100] * rest if isinstance(labels, list) else labels)
    return {name: torch.tensor(values) for name, values in batch.items()}


def encoder_rows(*, words: bool) -> SeededRows:
    made = rows(8)
    return SeededRows([row | {"labels": [n % 3 for n in row["input_ids"]] if words else 1} for row in made], 42)


@pytest.mark.parametrize("pooling", [Pooling.FIRST, Pooling.LAST])
def test_encoders_rows_always_hold_the_pooled_token(pooling: Pooling) -> None:
    collate = ClassificationCollator(padded, EncoderDraw(0.3, pooling=pooling))
    data = encoder_rows(words=False)
    for epoch in range(5):
        data.set_epoch(epoch)
        batch = collate([data[row] for row in range(8)])
        assert "draw_seed" not in batch and batch["labels"].tolist() == [1] * 8
        last = batch["attention_mask"].sum(1) - 1
        pooled = torch.zeros_like(last) if pooling is Pooling.FIRST else last
        assert (batch["selected_positions"] == pooled[:, None]).any(1).all()
        counts = [selected_count(0.3, length) for length in batch["attention_mask"].sum(1).tolist()]
        assert batch["attention_mask"].gather(1, batch["selected_positions"]).sum(1).tolist() == counts
        real, selected, learnt = (int(count) for count in collate.count(batch))
        assert (real, selected, learnt) == (int(batch["attention_mask"].sum()), sum(counts), 8)


@pytest.mark.parametrize("in_place", [False, True])
def test_labels_of_words_stay_with_the_selected_ones(in_place: bool) -> None:
    data = encoder_rows(words=True)
    plain = ClassificationCollator(padded)([data[row] for row in range(8)])
    collate = ClassificationCollator(padded, EncoderDraw(5, in_place=in_place))
    batch = collate([data[row] for row in range(8)])
    expected = plain["labels"].gather(1, batch["selected_positions"])
    if in_place:
        assert batch["labels"].shape == plain["labels"].shape
        assert torch.equal(batch["labels"].gather(1, batch["selected_positions"]), expected)
        assert (batch["labels"] != -100).sum() == (expected != -100).sum()
    else:
        assert torch.equal(batch["labels"], expected)
    assert int(collate.count(batch)[2]) == sum(min(5, len(data[row]["input_ids"])) for row in range(8))


def test_encoders_draws_do_not_depend_on_the_batch() -> None:
    data, collate = encoder_rows(words=True), ClassificationCollator(padded, EncoderDraw(0.3))
    together = collate([data[row] for row in range(8)])
    for row in range(8):
        alone = collate([data[row]])["selected_positions"][0].tolist()
        length = len(data[row]["input_ids"])
        assert [p for p in together["selected_positions"][row].tolist() if p < length] == alone


def test_images_are_drawn_by_their_number_of_tokens() -> None:
    images = SeededRows([{"pixel_values": torch.ones(1, 4, 4), "labels": n} for n in range(3)], 42)
    draw = EncoderDraw(0.5, pooling=Pooling.ALL, first_always=True)
    collate = ClassificationCollator(stack_images, draw, tokens_per_image=9)
    batch = collate([images[row] for row in range(3)])
    assert batch["pixel_values"].shape == (3, 1, 4, 4) and batch["labels"].tolist() == [0, 1, 2]
    assert batch["selected_positions"].shape == (3, 5) and (batch["selected_positions"][:, 0] == 0).all()
    assert [int(count) for count in collate.count(batch)] == [27, 15, 3]
