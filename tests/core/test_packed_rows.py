"""--packing: rows of documents that keep their draws and labels, and a run that learns what it learns without it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES, SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import gemma, llama, mistral
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokentune import apply_tokentune
from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.packing import PackedCollator, PackedRows, bins_of, fill_rate, pack
from tokentune.data.packing_check import check_separation
from tokentune.data.row_sizes import lengths_of
from tokentune.errors import UserError
from tokentune.finetune import main

PAD = 7  # a token as well
REQUIRED = ["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data"]


def rows(count: int = 9, longest: int = 24, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of 2 tokens and more, the first fifth of each prompt; the very first token of some has a label too."""
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = 2 + number * 5 % (longest - 1)
        ids = generator.integers(3, 90, length).tolist()
        prompt = 0 if number % 3 == 0 else max(1, length // 5)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def packed_batch(
    data: list[dict], prefix_length: float | int | None, max_length: int = 40, **options: Any
) -> dict[str, Any]:
    """All documents in one batch of packed rows."""
    packed = pack(SeededRows(data, 42), max_length)
    collator = PackedCollator(CausalCollator(PAD, prefix_length=prefix_length, **options))
    return collator([packed[row] for row in range(len(packed))])


# ---- rows ------------------------------------------------------------------------------------------------------------


def slow_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """The rooms that are left, by the definition of best-fit decreasing."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max_length) - length)
    return sorted(rooms)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60))
def test_bins_are_those_of_best_fit_decreasing(lengths: list[int]) -> None:
    bins = bins_of(lengths, 30)
    assert sorted(document for documents in bins for document in documents) == list(range(len(lengths)))
    rooms = [30 - sum(lengths[document] for document in documents) for documents in bins]
    assert sorted(rooms) == slow_best_fit(lengths, 30)
    assert bins == bins_of(np.array(lengths), 30)


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="2 to 31 tokens do not fit rows of 30"):
        bins_of([2, 31], 30)


def test_lengths_of_a_table_follow_its_rows() -> None:
    data = Dataset.from_list(rows(50))
    expected = [len(row["input_ids"]) for row in rows(50)]
    assert lengths_of(data).tolist() == lengths_of(rows(50)).tolist() == expected
    order = [3, 3, 49, 0]
    assert lengths_of(data.select(order)).tolist() == [expected[row] for row in order]


def test_documents_keep_the_draw_seeds_that_they_have_alone() -> None:
    alone, packed = SeededRows(rows(), 42), pack(SeededRows(rows(), 42), 40)
    assert 1 < len(packed) == len(packed.bins) < len(alone)
    for epoch in (0, 3):
        alone.set_epoch(epoch)
        packed.set_epoch(epoch)
        for row, documents in enumerate(packed.bins):
            assert packed[row] == {"documents": [alone[document] for document in documents]}


def test_fill_rate_counts_places() -> None:
    assert fill_rate(np.array([3, 5, 4]), [[0, 1], [2]], 8) == 12 / 16


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_length", [None, 0.3, 4, 1.0])
@pytest.mark.parametrize("strategy", ["random", "reference"])
def test_a_batch_holds_each_document_as_it_is_alone(prefix_length: int | float | None, strategy: str) -> None:
    data = rows()
    seeded, packed = SeededRows(data, 42), pack(SeededRows(data, 42), 40)
    collator = CausalCollator(PAD, prefix_length=prefix_length, strategy=strategy)
    batch = PackedCollator(collator)([packed[row] for row in range(len(packed))])
    assert "attention_mask" not in batch and batch["use_cache"] is False
    total = torch.zeros(3, dtype=torch.int64)
    for row, documents in enumerate(packed.bins):
        start = 0
        for document in documents:
            alone, end = collator([seeded[document]]), start + len(data[document]["input_ids"])
            total += torch.stack(collator.count(alone))
            assert batch["input_ids"][row, start:end].tolist() == data[document]["input_ids"]
            assert batch["position_ids"][row, start:end].tolist() == list(range(end - start))
            assert batch["labels"][row, start] == -100  # the token before it is another document's
            assert torch.equal(batch["labels"][row, start + 1 : end], alone["labels"][0, 1:])
            if prefix_length is not None:
                drawn = batch["selected_positions"][row]
                inside = drawn[(drawn >= start) & (drawn < end)] - start
                assert torch.equal(inside, alone["selected_positions"][0])
            start = end
        assert (batch["input_ids"][row, start:] == PAD).all()
        assert (batch["labels"][row, start:] == -100).all() and (batch["position_ids"][row, start:] == 0).all()
    assert torch.equal(torch.stack(PackedCollator.count(batch)), total)
    if prefix_length is not None:
        assert (batch["selected_positions"].diff(dim=1) > 0).all()
        assert batch["selected_positions"].max() < batch["input_ids"].shape[1]
        assert batch["num_supervised"] == total[2]


def test_rows_that_select_fewer_are_filled_up_with_padding() -> None:
    """Eight documents of two tokens against one of sixteen: one token of each, or a count of four of each."""
    documents = [{"input_ids": [5, 6], "labels": [-100, 6]} for _ in range(8)]
    documents.append({"input_ids": [5] * 16, "labels": [-100] + [5] * 15})
    for prefix_length, selected, width in ((0.25, 8, 20), (4, 16, 28), (1.0, 16, 16)):
        batch = packed_batch(documents, prefix_length, max_length=16)
        assert batch["selected_positions"].shape == (2, selected), prefix_length
        assert batch["input_ids"].shape == (2, width), prefix_length
    assert packed_batch(documents, 0.25, max_length=16, pad_to_multiple_of=8)["input_ids"].shape == (2, 24)


@pytest.mark.parametrize("prefix_length", [None, 0.3])
def test_a_row_without_targets_fills_a_batch_up(prefix_length: float | None) -> None:
    """What the last batch of several processes gets, instead of rows that would count twice."""
    packed, collator = pack(SeededRows(rows(), 42), 40), CausalCollator(PAD, prefix_length=prefix_length)
    whole, filled = (PackedCollator(collator)([packed[row] for row in numbers]) for numbers in ((1,), (1, None)))
    assert torch.equal(filled["labels"][0], whole["labels"][0]) and (filled["labels"][1] == -100).all()
    assert PackedCollator.count(filled)[2] == PackedCollator.count(whole)[2] > 0
    model = apply_tokentune(llama().double().train(), verify=False)
    losses = [model(**batch, num_items_in_batch=20).loss for batch in (whole, filled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6) and losses[0].item() > 0


def test_workers_make_the_same_batches() -> None:
    packed = PackedRows(SeededRows(rows(), 42), bins_of(lengths_of(rows()), 40))
    collator = PackedCollator(CausalCollator(PAD, prefix_length=0.3))
    here, there = (DataLoader(packed, batch_size=2, collate_fn=collator, num_workers=n) for n in (0, 1))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


# ---- the same gradients ----------------------------------------------------------------------------------------------


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What models cast to float32 (norms, softmax, losses) stays in float64, in recomputations too."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def gradients(model: nn.Module, batches: list[dict[str, Any]], items: int) -> dict[str, Tensor]:
    """Of the mean over all selected supervised tokens of all batches."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["plain", "plain checkpointed", "selective", "selective checkpointed", "segments"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("build", [llama, mistral, gemma])
def test_packed_gradients_are_the_unpacked_ones(build: Callable, adapters: bool, method: str, float64: None) -> None:
    model = build().double().train()
    if adapters:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        model = model.double().train()
    selective = not method.startswith("plain")
    if selective:
        apply_tokentune(model, verify=False, checkpoint_rest="segments" if method == "segments" else "auto")
    if "checkpointed" in method or method == "segments":
        (model.get_base_model() if adapters else model).activation_checkpointing_enable()
    data = rows()
    seeded, collator = SeededRows(data, 42), CausalCollator(PAD, prefix_length=0.3 if selective else None)
    unpacked = [collator([seeded[row] for row in part]) for part in (range(4), range(4, 9))]
    items = sum(int(collator.count(batch)[2]) for batch in unpacked)
    packed = pack(SeededRows(data, 42), 40)
    batches = [PackedCollator(collator)([packed[row] for row in part]) for part in (range(2), range(2, len(packed)))]
    assert sum(int(PackedCollator.count(batch)[2]) for batch in batches) == items
    expected, found = gradients(model, unpacked, items), gradients(model, batches, items)
    assert found.keys() == expected.keys() and len(found) >= 8
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / max(gradient.abs().max(), 1e-3 * scale)
        assert error < 1e-10, f"{name}: {error:.1e}"


@pytest.mark.parametrize("prefix_length", [None, 0.3])
@pytest.mark.parametrize("build", [llama, mistral, gemma])
def test_a_document_sees_nothing_of_its_neighbours(build: Callable, prefix_length: float | None) -> None:
    """To the last bit, in float32."""
    model = apply_tokentune(build().train(), verify=False, chunked_loss=False)
    data = [row for row in rows(6) if len(row["input_ids"]) > 6]
    other = copy.deepcopy(data)
    other[0]["input_ids"] = [(token + 11) % 90 for token in other[0]["input_ids"]]
    logits = []
    for documents in (data, other):
        seeded = SeededRows(documents, 1)
        items = [{"documents": [seeded[row] for row in range(len(documents))]}]
        batch = PackedCollator(CausalCollator(PAD, prefix_length=prefix_length))(items)
        logits.append(model(**batch).logits)
    positions = batch.get("selected_positions", torch.arange(batch["input_ids"].shape[1])[None])[0]
    of_first = positions < len(data[0]["input_ids"])
    assert of_first.any() and not torch.equal(logits[0][0, of_first], logits[1][0, of_first])
    assert torch.equal(logits[0][0, ~of_first], logits[1][0, ~of_first])


# ---- models that can be packed ---------------------------------------------------------------------------------------


def family(name: str) -> nn.Module:
    import transformers

    entry = next(entry for entry in FAMILIES if entry.name == name)
    cls = getattr(transformers, entry.model)
    with torch.device("meta"):
        return cls._from_config(cls.config_class(**SIZES | entry.sizes), attn_implementation=entry.attention)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "Qwen3-MoE", "GPT-2"])
@pytest.mark.parametrize("selective", [False, True])
def test_models_that_keep_documents_apart_pass(name: str, selective: bool) -> None:
    model = family(name)
    check_separation(apply_tokentune(model) if selective else model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GPT-OSS", "does not keep the documents of a row apart"),  # its masks are handed no positions
        ("OPT", "does not keep the documents of a row apart"),  # counts positions by itself
        ("Bloom", "has no layers that send their attention through transformers' attention interface"),
        ("Qwen3-Next", "mixes tokens in .*DeltaNet, outside of attention"),
    ],
)
def test_models_that_do_not_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"--packing: .*{reason}"):
        check_separation(family(name))


def test_kernels_without_masks_are_refused() -> None:
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match="--packing: attention by flash_attention_2 takes no mask"):
        check_separation(model)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(model: Path, data: Path, folder: Path, words: str) -> dict[str, Any]:
    names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--model_save_path", str(folder)]
    fixed = "--max_length 256 --warmup_steps 0 --report_to none --logging_steps 1 --lora --lora_dropout 0 "
    main([*names, *(fixed + words).split()])
    (summary,) = folder.glob("*/training_summary.json")
    return json.loads(summary.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["", "--tokentune --prefix_length 0.3"])
def test_a_packed_run_learns_what_an_unpacked_one_does(
    method: str, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The sixteen documents in one optimizer step: the same losses, tokens and gradient norms, epoch by epoch."""
    words = f"{method} --num_epochs 2 --learning_rate 1e-3 --skip_verification --skip_memory_probe"
    alone = run(tiny_llama_dir, alpaca_file, tmp_path / "alone", f"--global_batch_size 16 {words}")
    packed = run(
        tiny_llama_dir,
        alpaca_file,
        tmp_path / "packed",
        f"--packing --global_batch_size 16 --gradient_accumulation_steps 8 {words}",
    )
    assert "16 documents in " in caplog.text and "% full" in caplog.text
    assert packed["optimizer_steps"] == alone["optimizer_steps"] == 2
    assert packed["tokens"] == alone["tokens"]
    for name in ("loss", "grad_norm"):
        assert [e[name] for e in packed["log"]] == pytest.approx([e[name] for e in alone["log"]], rel=1e-4)


def test_packing_needs_all_rows() -> None:
    with pytest.raises(UserError, match="--streaming with --packing"):
        parse_arguments([*REQUIRED, "--packing", "--streaming", "--max_steps", "3"])
