"""The trainer: one update for every split into micro-batches, draws per epoch, the validation loss, what is saved."""

import ast
import inspect
import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_trainer import ROWS, arguments_for, make_rows, trained_parameters
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tokentune
from tokentune import apply_tokentune
from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.prompts import ensure_pad_token
from tokentune.errors import UserError
from tokentune.models.builder import prepare_model, saved_as
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.training.build import build_trainer
from tokentune.training.callbacks import Progress
from tokentune.training.checkpoints.run_folder import check_run_folder, clear_run_folder
from tokentune.training.result import save_result
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import Extent, build_training_arguments, settle_by_length

# ---- what `auto` comes to --------------------------------------------------------------------------------------------

AUTO = "--warmup_steps auto --logging_steps auto"


@pytest.mark.parametrize(
    ("steps", "warmup", "logging"),
    [(1, 0, 1), (33, 0, 1), (34, 1, 1), (68, 2, 1), (250, 7, 5), (20_000, 600, 400), (10**6, 3000, 1000)],
)
def test_warmup_and_log_lines_follow_the_length_of_a_run(steps: int, warmup: int, logging: int, tmp_path: Path) -> None:
    """Of a stream, the length is --max_steps."""
    arguments = arguments_for(tmp_path, tmp_path, f"{AUTO} --streaming --max_steps {steps}")
    settings = build_training_arguments(arguments, tmp_path / "run")
    settle_by_length(settings, arguments, Extent.of(iter([]), settings).steps)
    assert (settings.warmup_steps, settings.logging_steps) == (warmup, logging)
    given = arguments_for(tmp_path, tmp_path, "--warmup_steps 0.1 --logging_steps 7")
    settings = build_training_arguments(given, tmp_path / "run")
    settle_by_length(settings, given, steps)
    assert (settings.warmup_steps, settings.logging_steps) == (0.1, 7)


def test_a_short_run_reaches_its_learning_rate(
    make_trainer: Callable[..., SelectiveTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = make_trainer(f"--global_batch_size 2 --num_epochs 4 {AUTO}")
    assert "auto: --warmup_steps 1 --logging_steps 1 (optimizer steps: 40)" in caplog.text
    assert trainer.auto_values == {"gradient_accumulation_steps": 1, "warmup_steps": 1, "logging_steps": 1}
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(rates) == 40 and rates[0] == 0 and max(rates) == trainer.args.learning_rate


# ---- the update does not depend on how a global batch is cut ---------------------------------------------------------


@pytest.mark.parametrize("method", ["", "--tokentune --prefix_length 0.3", "--lora --lora_dropout 0 --tokentune"])
def test_accumulation_gives_the_same_update(method: str, make_trainer: Callable[..., SelectiveTrainer]) -> None:
    updates = {}
    for accumulation in (8, 4, 1):  # micro-batches of 1, 2 and 8 rows; 19 rows: windows of 8, 8 and 3
        words = f"--global_batch_size 8 --gradient_accumulation_steps {accumulation} --learning_rate 1e-2 {method}"
        trainer = make_trainer(words, dtype=torch.float64)
        before = trained_parameters(trainer)
        trainer.train()
        assert trainer.state.global_step == math.ceil(ROWS / 8) == Extent.of(range(ROWS), trainer.args).steps
        updates[accumulation] = {name: p - before[name] for name, p in trained_parameters(trainer).items()}
    for accumulation in (4, 1):
        for name, update in updates[8].items():
            assert update.abs().max() > 1e-4, name
            torch.testing.assert_close(updates[accumulation][name], update, rtol=1e-6, atol=1e-9, msg=name)


def test_loss_of_a_window_is_the_mean_over_its_selected_targets(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    """The first log entry against the definition: every selected supervised token of the window weighs the same."""
    trainer = make_trainer("--global_batch_size 19 --gradient_accumulation_steps 19 --tokentune", dtype=torch.float64)
    collate = trainer.data_collator
    losses = []
    for row in range(ROWS):
        batch = collate([trainer.train_dataset[row]])
        positions = batch["selected_positions"]
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=batch["input_ids"]).logits
        for t in positions[0].tolist():
            target = batch["labels"][0, t + 1].item() if t + 1 < batch["labels"].shape[1] else -100
            if target != -100:
                losses.append(nn.functional.cross_entropy(logits[0, t], torch.tensor(target)).item())
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-6)  # the Trainer sums in float32
    assert trainer.figures.tokens["selected_supervised"] == len(losses)


@pytest.mark.parametrize("method", ["--tokentune", "--lora --tokentune", "--qlora --tokentune", "--lora"])
def test_model_gets_the_count_of_the_whole_window(method: str, make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer(f"--global_batch_size 8 --gradient_accumulation_steps 4 {method}")
    assert trainer.model_accepts_loss_kwargs
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((int(kwargs["num_items_in_batch"]), int((kwargs["labels"][:, 1:] != -100).sum())))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    trainer.train()
    assert len(seen) == math.ceil(ROWS / 2)
    for start in range(0, len(seen), 4):
        window = seen[start : start + 4]
        assert {count for count, _ in window} == {sum(targets for _, targets in window)}


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_draws_depend_on_epoch_and_row_alone(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    def draws(words: str) -> list[dict[tuple, tuple]]:
        trainer = make_trainer(f"--num_epochs 2 --tokentune --prefix_length 0.3 {words}")
        epochs: list[dict[tuple, tuple]] = [{}, {}]
        step = trainer.training_step

        def note(model: nn.Module, inputs: dict[str, Tensor], items: Any) -> Tensor:
            for ids, mask, positions in zip(
                inputs["input_ids"], inputs["attention_mask"], inputs["selected_positions"], strict=True
            ):
                length = int(mask.sum())
                chosen = tuple(p for p in positions.tolist() if p < length)
                epochs[int(trainer.state.epoch)][tuple(ids[:length].tolist())] = chosen
            return step(model, inputs, items)

        trainer.training_step = note
        trainer.train()
        return epochs

    alone = draws("--global_batch_size 8 --gradient_accumulation_steps 2")
    assert [len(epoch) for epoch in alone] == [ROWS, ROWS]
    changed = [row for row in alone[0] if alone[0][row] != alone[1][row]]
    assert len(changed) > ROWS / 2
    assert draws("--global_batch_size 8 --gradient_accumulation_steps 2 --num_workers 2") == alone
    assert draws("--global_batch_size 8 --gradient_accumulation_steps 8") == alone
    assert draws("--global_batch_size 8 --gradient_accumulation_steps 2 --seed 7") != alone


def test_epoch_is_told_before_its_rows_are_read(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    """Directly: in one process accelerate's loader would tell it as well, among several it does not."""
    trainer = make_trainer("--global_batch_size 8 --num_epochs 2")
    told, when_read = [], []
    trainer.train_dataset.set_epoch = told.append
    loader = trainer.get_train_dataloader()

    class PassesNoEpochOn:
        dataset = loader.dataset

        def __len__(self) -> int:
            return len(loader)

        def __iter__(self) -> Iterator:
            when_read.append(told[-1])
            return iter(loader)

    trainer.get_train_dataloader = PassesNoEpochOn
    trainer.train()
    assert when_read == [0, 1]


def test_order_is_shuffled_by_the_seed(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    def order(seed: int) -> list[tuple]:
        trainer = make_trainer(f"--global_batch_size 1 --seed {seed}")
        return [tuple(batch["input_ids"][0].tolist()) for batch in trainer.get_train_dataloader()]

    in_file = [tuple(row["input_ids"]) for row in make_rows(ROWS)]
    first = order(42)
    assert sorted(first) == sorted(in_file) and first != in_file
    assert order(42) == first and order(43) != first


# ---- gradients in every precision ------------------------------------------------------------------------------------

PRECISIONS = {
    "float32": "--base_dtype float32",
    "bfloat16": "--base_dtype bfloat16",
    "autocast": "--base_dtype float32 --bf16",
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["", "--lora", "--qlora"])
def test_every_trainable_parameter_gets_a_gradient(
    method: str, precision: str, make_trainer: Callable[..., SelectiveTrainer]
) -> None:
    class Gradients(TrainerCallback):
        last: dict[str, Tensor]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            self.last = {name: p.grad for name, p in named if p.requires_grad}
            self.last = {name: None if g is None else g.clone() for name, g in self.last.items()}

    words = f"--tokentune --prefix_length 0.5 --global_batch_size 8 --gradient_accumulation_steps 2 {method} "
    trainer = make_trainer(words + PRECISIONS[precision], rows=16)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()  # two steps: the first moves lora_B off zero, only then has lora_A a gradient
    assert trainer.state.global_step == 2
    assert gradients.last
    for name, gradient in gradients.last.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name
    if method:
        assert sum(p.abs().sum() for name, p in trainer.model.named_parameters() if "lora_B" in name) > 0
        assert all(".lora_" in name for name in gradients.last)


# ---- validation ------------------------------------------------------------------------------------------------------


def token_mean(model: nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Loss per supervised token, one row after the other."""
    total = count = 0
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_validation_loss_is_per_token_and_of_the_untouched_model(
    micro_batch: int, tiny_llama_dir: Path, make_trainer: Callable[..., SelectiveTrainer]
) -> None:
    rows = make_rows(11, seed=5)
    words = f"--tokentune --prefix_length 2 --learning_rate 1e-2 --global_batch_size {micro_batch} --eval_steps 2"
    trainer = make_trainer(words, eval_rows=rows, rows=5 * micro_batch)
    trainer.train()
    assert [step for step, _ in trainer.figures.validation_losses] == [0, 2, 4, 5]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    assert trainer.figures.validation_losses[0][1] == pytest.approx(token_mean(base, rows), rel=1e-5)
    base.load_state_dict(trainer.model.state_dict())
    assert trainer.figures.validation_losses[-1][1] == pytest.approx(token_mean(base, rows), rel=1e-5)
    assert trainer.figures.validation_losses[-1][1] != pytest.approx(trainer.figures.validation_losses[0][1], rel=1e-3)


def test_evaluation_changes_no_update(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    words = "--tokentune --prefix_length 0.3 --global_batch_size 4 --learning_rate 1e-2 --lora"
    plain = make_trainer(words)
    plain.train()
    watched = make_trainer(f"{words} --eval_steps 1", eval_rows=make_rows(5, seed=5))
    watched.train()
    for name, parameter in trained_parameters(plain).items():
        torch.testing.assert_close(trained_parameters(watched)[name], parameter, rtol=0, atol=0)


# ---- figures and progress --------------------------------------------------------------------------------------------


def test_log_holds_memory_speed_and_every_step(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer("--tokentune --prefix_length 3 --global_batch_size 4 --num_epochs 2 --logging_steps 4")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 4, 8, 10]
    for entry in entries:
        assert entry["memory_peak_gib"] >= entry["memory_allocated_gib"] > 0
        assert entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0
    rows = make_rows(ROWS)
    counts = trainer.figures.tokens
    assert counts["processed"] == 2 * sum(len(row["input_ids"]) for row in rows)
    assert counts["selected"] == 2 * 3 * ROWS
    assert 0 < counts["selected_supervised"] < counts["selected"]
    rate = counts["processed"] / trainer.figures.training_seconds
    slowest, fastest = min(e["tokens_per_second"] for e in entries), max(e["tokens_per_second"] for e in entries)
    assert slowest <= rate <= fastest


def test_saved_bytes_are_measured_once_and_shrink_with_the_selection(
    make_trainer: Callable[..., SelectiveTrainer],
) -> None:
    saved = {}
    for words in ("", "--tokentune --prefix_length 0.2"):
        trainer = make_trainer(f"--global_batch_size 8 {words}")
        trainer.train()
        saved[words] = trainer.figures.saved_for_backward_bytes
    assert 0 < saved["--tokentune --prefix_length 0.2"] < 0.5 * saved[""]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_bar_with_what_is_told_above_it(
    make_trainer: Callable[..., SelectiveTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step, time to go, loss, learning rate, speed, memory; a message in between does not tear it."""
    terminal, logger = Terminal(), logging.getLogger("tokentune")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    logger.handlers = [logging.StreamHandler()]
    trainer = make_trainer(
        "--global_batch_size 4 --save_steps 2 --learning_rate 1e-3 --lr_scheduler_type constant", eval_rows=make_rows(2)
    )
    trainer.add_callback(Saying(logger))
    trainer.train()
    lines = terminal.getvalue().split("\n")
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    bar = lines[-2].split("\r")[-1]
    assert re.fullmatch(
        r"step 5/5 \|\S+\| loss (\S+), lr 1.0e-03, \d+ tok/s, \d+\.\d\d GiB \(peak \d+\.\d\d\) *", bar
    ), bar
    assert f"loss {entry['loss']:.4f}" in bar
    assert re.search(r"step 3/5 \|\S+ *\| ETA 00:0\d, loss ", terminal.getvalue())
    above = [line.split("\r")[-1] for line in lines[:-2]]
    said = [line for line in above if "validation loss" in line]
    assert [line.split("  ")[0] for line in said] == ["step 0/5", "step 5/5"]
    assert above.count("a message") == 1 and len(logger.handlers) == 1
    assert "Writing" not in terminal.getvalue()  # transformers' bar, of each checkpoint


class Saying(TrainerCallback):
    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger

    def on_save(self, args: object, state: object, *rest: object, **more: object) -> None:
        if state.global_step == 2:
            self.logger.warning("a message")


def test_progress_elsewhere_is_one_line_per_log_entry(
    make_trainer: Callable[..., SelectiveTrainer], capsys: pytest.CaptureFixture
) -> None:
    make_trainer("--global_batch_size 4 --logging_steps 2", eval_rows=make_rows(2)).train()
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["0/5", "1/5", "2/5", "4/5", "5/5", "5/5"]
    assert all("loss" in line for line in lines)
    assert "memory GiB: resident" in lines[1]
    assert ["  ETA 00:0" in line for line in lines] == [False, True, True, True, False, False]


def test_the_bar_ends_before_an_error_is_told(
    make_trainer: Callable[..., SelectiveTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    trainer = make_trainer("--global_batch_size 4 --learning_rate 1e30 --max_grad_norm 0 --num_epochs 4")
    with pytest.raises(UserError, match="nan or infinite"):
        trainer.train()
    assert terminal.getvalue().endswith("\n")


def test_progress_is_quiet_in_other_processes(capsys: pytest.CaptureFixture) -> None:
    class State:
        is_world_process_zero, global_step, max_steps = False, 1, 2

    Progress(dict).on_log(None, State(), None, logs={"eval_loss": 1.0})
    assert capsys.readouterr().out == ""


def test_tensorboard_files_go_to_logging_dir(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = f"--report_to tensorboard --logging_dir {tmp_path / 'board'} --global_batch_size 4"
    arguments = arguments_for(tiny_llama_dir, tmp_path, words)
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    ensure_pad_token(tokenizer, None)
    settings = build_training_arguments(arguments, tmp_path / "run")
    model = prepare_model(arguments, torch.float32)
    build_trainer(model, settings, SeededRows(make_rows(8), 42), None, tokenizer, arguments).train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    names = board.Tags()["scalars"]
    assert {"train/loss", "train/memory_peak_gib", "train/memory_allocated_gib", "train/tokens_per_second"} <= set(
        names
    )
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert not (tmp_path / "run" / "runs").exists()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_data_parallel_is_prevented(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    # It would try a step on the device that is not there.
    monkeypatch.setattr("tokentune.training.trainer_arguments.check_optimizer", lambda settings: None)
    assert TrainingArguments(str(tmp_path), report_to="none").n_gpu == 2  # the Trainer would wrap the model
    settings = build_training_arguments(arguments_for(tiny_llama_dir, tmp_path, "--global_batch_size 8"), tmp_path)
    assert settings.n_gpu == 1
    assert settings.train_batch_size == 8


def test_warmup_that_never_ends_is_told(
    make_trainer: Callable[..., SelectiveTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer("--global_batch_size 8 --warmup_steps 2")
    assert "never reaches its peak" not in caplog.text
    make_trainer("--global_batch_size 8 --warmup_steps 3")
    assert "--warmup_steps 3: this run has 3 optimizer steps" in caplog.text


def test_loss_that_is_no_number_stops_the_run_and_saves_nothing(
    make_trainer: Callable[..., SelectiveTrainer], tmp_path: Path
) -> None:
    trainer = make_trainer("--tokentune --global_batch_size 4 --logging_steps 1000 --save_steps 1")
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="training loss became nan or infinite at step 1:"):
        trainer.train()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_adapters_that_never_moved_are_not_saved(make_trainer: Callable[..., SelectiveTrainer], tmp_path: Path) -> None:
    trainer = make_trainer("--lora --tokentune --global_batch_size 32 --warmup_steps 100")  # one step at rate 0
    trainer.train()
    with pytest.raises(UserError, match="nothing was learnt: every lora_B is still zero"):
        save_result(trainer, tmp_path / "run", torch.float32)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


# ---- the run's folder ------------------------------------------------------------------------------------------------


def test_checkpoints_lie_in_the_folder_and_none_repeats_the_result(
    make_trainer: Callable[..., SelectiveTrainer], tmp_path: Path
) -> None:
    trainer = make_trainer("--lora --global_batch_size 3 --save_steps 2 --save_total_limit 2")
    trainer.train()
    assert trainer.state.global_step == 7
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors").is_file()


def test_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    check_run_folder(run, {"overwrite_output_dir": False})
    assert not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    check_run_folder(run, {"overwrite_output_dir": False})
    (run / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="checkpoints of an unfinished run"):
        check_run_folder(run, {"overwrite_output_dir": False})
    (run / "training_summary.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"a finished run\.\n.*--overwrite_output_dir"):
        check_run_folder(run, {"overwrite_output_dir": False})
    check_run_folder(run, {"overwrite_output_dir": True})
    before = {"seed": 1, "learning_rate": 0.1, "save_steps": 5, "dataset_name_or_path": ["a/train.jsonl"]}
    (run / "training_summary.json").write_text(json.dumps({"settings": before}))
    now = {
        "seed": 1,
        "learning_rate": 0.2,
        "save_steps": 9,
        "dataset_name_or_path": ["b/train.jsonl"],
        "run_name": None,
    }
    now |= {"overwrite_output_dir": False, "dry_run": True}
    told = check_run_folder(run, now)
    assert told == (
        f"{run} already holds a finished run.\n"
        "Not as there: --learning_rate 0.2 (there 0.1), --dataset_name_or_path b/train.jsonl (there a/train.jsonl).\n"
        "Give this one a name of its own with --run_name, or --overwrite_output_dir to replace the other."
    )
    with pytest.raises(UserError, match="Not as there"):
        check_run_folder(run, now | {"dry_run": False})
    clear_run_folder(run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_full_training_is_saved_in_the_checkpoint_s_type(
    tiny_llama_dir: Path, make_trainer: Callable[..., SelectiveTrainer], tmp_path: Path
) -> None:
    config = load_config(str(tiny_llama_dir))
    config.dtype = torch.bfloat16
    assert saved_as(arguments_for(tiny_llama_dir, tmp_path, ""), config, torch.float32) is torch.bfloat16
    held = arguments_for(tiny_llama_dir, tmp_path, "--base_dtype float32")
    assert saved_as(held, config, torch.float32) is torch.float32

    trainer = make_trainer("--tokentune --global_batch_size 8")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    facts = save_result(trainer, tmp_path / "run", torch.bfloat16)
    assert facts["saved_dtype"] == "bfloat16" and facts["class"] == "LlamaForCausalLM"
    assert facts["trainable_parameters"] == facts["parameters"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.dtype is torch.bfloat16
    assert saved.config.use_cache is True


def test_a_plain_patched_model_counts_like_the_command(tiny_llama_dir: Path) -> None:
    """`selected_positions` survive the Trainer: the model returns one row of logits for each of them."""
    model = apply_tokentune(AutoModelForCausalLM.from_pretrained(tiny_llama_dir))
    batch = CausalCollator(0, prefix_length=4)([SeededRows(make_rows(3), 42)[index] for index in range(3)])
    assert model.train()(**batch).logits.shape[:2] == (3, 4)


def test_a_loss_without_window_counts_is_told(
    make_trainer: Callable[..., SelectiveTrainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    with caplog.at_level(logging.WARNING, logger="tokentune"):
        make_trainer("--global_batch_size 8 --gradient_accumulation_steps 2")
        assert "num_items_in_batch" not in caplog.text
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
        make_trainer("--global_batch_size 8 --gradient_accumulation_steps 2")
    assert "does not take num_items_in_batch" in caplog.text


# ---- what the Trainer has to have ------------------------------------------------------------------------------------

# The private members of transformers' classes that a run calls (it overrides none), and why.
PRIVATE_MEMBERS = {
    "Trainer._prepare_for_training": "since 5.17 or before: the engine around model and optimizer, and their states",
    "Trainer._load_best_model": "since 4.57 or before: the best weights, as FSDP or DeepSpeed reads them",
    "Trainer._save_optimizer_and_scheduler": "since 4.57 or before: their states, as each engine writes them",
    "Trainer._save_scaler": "since 4.57 or before: float16's loss scale",
    "Trainer._save_rng_state": "since 4.57 or before: random numbers of the process, on each kind of device",
    "Trainer._load_rng_state": "since 4.57 or before: the same, read without unpickling code",
    "TrainingArguments._n_gpu": "since 4.57 or before: 1, or several GPUs are taken for nn.DataParallel's",
}


def private_members_used() -> set[str]:
    """`_name` of every attribute of a trainer or its settings in the package that transformers defines."""
    defined = {name for kind in (Trainer, TrainingArguments) for name in vars(kind)}
    for kind in (Trainer, TrainingArguments):  # and attributes that they set
        defined |= set(re.findall(r"self\.(_\w+)", inspect.getsource(kind)))
    own = set(re.findall(r"self\.(_\w+) = ", inspect.getsource(SelectiveTrainer)))
    used, overridden = set(), {name for name in vars(SelectiveTrainer) if not name.startswith("__")}
    for path in Path(tokentune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and re.search(r"trainer|settings|super", ast.unparse(node.value)):
                used.add(node.attr)
    private = {name for name in (used - own) | overridden if re.match(r"_[a-z]", name)}
    return private & defined


def test_the_private_members_of_transformers_are_there_and_no_other_is_used() -> None:
    kinds = {"Trainer": Trainer, "TrainingArguments": TrainingArguments}
    for member, reason in PRIVATE_MEMBERS.items():
        kind, name = member.split(".")
        assert name in inspect.getsource(kinds[kind]), (
            f"transformers {transformers.__version__} has no {member} any more, which a run needs ({reason}): "
            "see what took its place, and change tokentune/training/ accordingly"
        )
    assert private_members_used() == {member.split(".")[1] for member in PRIVATE_MEMBERS}
    parameters = list(inspect.signature(Trainer._prepare_for_training).parameters)
    assert parameters == ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]


def test_whole_sequences_are_scored_too(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    """Batches that the selection takes whole: the logged loss of all tokens is their training loss."""
    trainer = make_trainer("--tokentune --prefix_length 256 --selection_pass --global_batch_size 8")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["loss_all_tokens"] == pytest.approx(entry["loss"], rel=1e-5)
