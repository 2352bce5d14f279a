"""Sizes that change over the run: what each optimizer step draws, with workers, accumulation and resuming."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokentune.cli.arguments import parse_arguments
from tokentune.core.patched import DrawCounts
from tokentune.data.collators import SeededRows
from tokentune.data.prompts import ensure_pad_token
from tokentune.memory.longest_rows import longest_batch
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.sampling.sampler import selected_count
from tokentune.sampling.schedule import Schedule, parse_prefix_length
from tokentune.training.build import build_trainer
from tokentune.training.checkpoints.run_folder import run_folder_name
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments

SIZES = Schedule(0.1, 0.9)
STEPS = 6  # two epochs of 9 rows in windows of 4: the last one of each has a single row


def rows(count: int = 9) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(3, 25 + n)), "labels": [-100] * 4 + list(range(7, 25 + n))} for n in range(count)]


@pytest.fixture
def make_trainer(tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., SelectiveTrainer]:
    def make(words: str = "", run: str = "run") -> SelectiveTrainer:
        fixed = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path rows.jsonl --model_save_path {tmp_path} "
        fixed += "--report_to none --warmup_steps 0 --logging_steps 1 --num_epochs 2 --learning_rate 1e-3 --tokentune "
        fixed += "--global_batch_size 4 --gradient_accumulation_steps 2 --prefix_length 0.1:0.9 --skip_verification "
        arguments = parse_arguments((fixed + words).split())
        settings = build_training_arguments(arguments, tmp_path / run)
        tokenizer, config = load_tokenizer(str(tiny_llama_dir)), load_config(str(tiny_llama_dir))
        ensure_pad_token(tokenizer, config.vocab_size)
        torch.manual_seed(0)
        model = prepare_model(arguments, base_dtype(arguments, config))
        trainer = build_trainer(model, settings, SeededRows(rows(), 42), None, tokenizer, arguments)
        trainer.arguments = arguments
        return trainer

    return make


def steps_of(trainer: SelectiveTrainer, **options: object) -> list[tuple[int, dict[str, Tensor]]]:
    """Trains; for each micro-batch its optimizer step and what the model got."""
    found = []

    def note(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        found.append((trainer.state.global_step, kwargs))

    handle = trainer.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    trainer.train(**options)
    handle.remove()
    return found


def test_sizes_over_a_run() -> None:
    assert [Schedule(0.1, 0.5).at(step, 5) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert [Schedule(64, 16).at(step, 4) for step in range(5)] == [64, 48, 32, 16, 16]
    assert Schedule(0.2, 0.4).at(0, 1) == 0.2 and Schedule(0.2, 0.4).largest == 0.4 == Schedule(0.4, 0.2).largest
    assert all(isinstance(Schedule(16, 64).at(step, 7), int) for step in range(7))


@pytest.mark.parametrize(
    ("text", "parsed"), [("0.1:0.5", Schedule(0.1, 0.5)), ("16:64", Schedule(16, 64)), ("1.0:0.3", Schedule(1.0, 0.3))]
)
def test_parsing(text: str, parsed: Schedule) -> None:
    found = parse_prefix_length(text)
    assert found == parsed and type(found.start) is type(parsed.start)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1:16", "one proportion to another"),
        ("16:1.0", "one proportion to another"),
        ("0.1:", "'' is neither"),
        (":0.5", "'' is neither"),
        ("0.1:0.2:0.3", "'0.2:0.3' is neither"),
        ("0.0:0.5", "'0.0' is neither"),
        ("0.5:1.5", "'1.5' is neither"),
        ("nan:0.5", "'nan' is neither"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prefix_length(text)


def test_the_run_s_folder_and_what_memory_is_for(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer()
    selection = trainer.arguments.selection
    assert selection.selected == 0.9 and selection.schedule == SIZES
    assert run_folder_name("m", "d", trainer.arguments.adapters, selection) == "m-d-tokentune-0.1-0.9"
    batch, shape = longest_batch(trainer, trainer.arguments, 2)
    assert shape == (2, 30) and batch["selected_positions"].shape == (2, selected_count(0.9, 30))


def test_each_optimizer_step_has_its_size(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer()
    found = steps_of(trainer)
    assert [step for step, _ in found] == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]  # both micro-batches of a step alike
    for step, batch in found:
        lengths = batch["attention_mask"].sum(-1)
        selected = batch["attention_mask"].gather(1, batch["selected_positions"]).sum(-1)
        size = 0.1 + 0.8 * step / (STEPS - 1)
        assert selected.tolist() == [selected_count(size, n) for n in lengths.tolist()]
        kept = (batch["labels"] != -100).sum()
        assert 0 < kept == batch["num_supervised"]
        window = sum(b["num_supervised"] for s, b in found if s == step)
        assert int(batch["num_items_in_batch"]) == window  # labels are counted after the draw
        assert "selection_draws" not in batch
    assert trainer.figures.tokens["selected"] == sum(
        int(b["attention_mask"].gather(1, b["selected_positions"]).sum()) for _, b in found
    )


def test_workers_that_fetch_ahead_and_resuming_change_nothing(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    whole = make_trainer("--save_steps 2")
    expected = steps_of(whole)
    for words, first, options in (
        ("--num_workers 2", 0, {}),
        ("--save_steps 2", 2, {"resume_from_checkpoint": str(Path(whole.args.output_dir) / "checkpoint-2")}),
    ):
        trainer = make_trainer(words, run="again")
        found = steps_of(trainer, **options)
        rest = [(step, batch) for step, batch in expected if step >= first]
        assert [step for step, _ in found] == [step for step, _ in rest]
        for (_, one), (_, other) in zip(found, rest, strict=True):
            assert torch.equal(one["selected_positions"], other["selected_positions"])
        for one, other in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_model_that_draws_itself_is_told_the_size(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer("--selection gradient")
    counted = []
    original = trainer.figures.count_draw

    def count(drawn: DrawCounts, *, selected: bool) -> None:
        before = int(trainer.figures._counts[1])
        original(drawn, selected=selected)
        counted.append((trainer.state.global_step, int(trainer.figures._counts[1]) - before))

    trainer.figures.count_draw = count
    found = steps_of(trainer)
    assert all("selection_draws" in batch for _, batch in found)
    for (step, batch), (same, number) in zip(found, counted, strict=True):
        lengths = batch["attention_mask"].sum(-1).tolist()
        assert step == same
        assert number == sum(selected_count(0.1 + 0.8 * step / (STEPS - 1), n) for n in lengths)
