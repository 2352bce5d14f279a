"""Runs that were killed go on to the last bit; what cannot go on is refused."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from killable_runs import (
    METHOD,
    MICRO_BATCHES,
    STEPS,
    Killed,
    Run,
    assert_same_run,
    child,
    die,
    exit_code,
    interrupted_copy,
    kill_myself,
    run,
    run_folder_in,
    stop_at,
    uninterrupted,
)

import tokentune.finetune
import tokentune.training.checkpoints.saving
import tokentune.training.checkpoints.writing
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.training.checkpoints.resuming import check_processes
from tokentune.training.checkpoints.run_state import RUN_STATE_NAME, read_run_state
from tokentune.training.checkpoints.same_run import check_same_run
from tokentune.training.checkpoints.saving import MANIFEST_NAME, fault_of, seal


@pytest.mark.parametrize(
    "method",
    [
        "--tokentune --prefix_length 0.3 --num_workers 2",
        "--tokentune --prefix_length answers+0.3:answers --group_by_length",
        "--tokentune --prefix_length 0.3:0.5 --selection random --gradient_correction 1",
        "--qlora --tokentune --prefix_length 0.3 --bf16",
        "--tokentune --gradient_accumulation_steps 1 --optim_in_backward --max_grad_norm 0",
        "--optim schedule_free_adamw --lr_scheduler_type constant",
        "--tokentune --optim galore_adamw --optim_args rank=8,update_proj_gap=2",
        "--lora --max_steps 8",
    ],
)
def test_every_method_goes_on_to_the_last_bit(method: str, run: Run, tmp_path: Path) -> None:
    """Killed in the middle of an epoch, behind a checkpoint at an epoch's end, before any step, and at the end."""
    expected = run(tmp_path / "whole", method)
    per_epoch = 3 if "accumulation_steps 1" in method else MICRO_BATCHES
    for micro_batch in (per_epoch + per_epoch // 2, per_epoch, 0):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, micro_batch, die)
            run(tmp_path / "killed", f"{method} --resume_from_checkpoint last")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokentune.finetune, "save_result", lambda *args: die())
        run(tmp_path / "killed", f"{method} --resume_from_checkpoint last")
    assert_same_run(run(tmp_path / "killed", f"{method} --resume_from_checkpoint"), expected)


def test_run_that_stopped_early_takes_no_further_step(run: Run, tmp_path: Path) -> None:
    """Killed behind the checkpoint of the step that it stopped at; the best weights are of the one before."""
    words = "--learning_rate 1 --lr_scheduler_type constant --eval_steps 1 --save_steps 1 --early_stopping_patience 1 "
    words += "--load_best_model_at_end"
    expected = run(tmp_path / "whole", words)
    assert json.loads((expected / "training_summary.json").read_text(encoding="utf-8"))["optimizer_steps"] == 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokentune.finetune, "save_result", lambda *args: die())
        run(tmp_path / "killed", words)
    assert (run_folder_in(tmp_path / "killed") / "checkpoint-2").is_dir()
    assert_same_run(run(tmp_path / "killed", f"{words} --resume_from_checkpoint"), expected)


# ---- killed, really --------------------------------------------------------------------------------------------------


def _in_step(patch: pytest.MonkeyPatch) -> None:
    stop_at(patch, 11, kill_myself)


def _in_writing_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokentune.training.checkpoints.writing, "write_states", kill_myself)


def _before_the_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokentune.training.checkpoints.writing, "publish", kill_myself)


def _in_deleting_an_old_one(patch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def rmtree(path: Path, **options: object) -> None:
        if str(path).endswith(".deleted"):
            next(Path(path).glob("adapter_model.safetensors")).unlink()
            kill_myself()
        real(path, **options)

    patch.setattr(shutil, "rmtree", rmtree)


def _before_the_summary(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokentune.finetune, "build_summary", kill_myself)


def test_killed_at_every_stage_of_a_checkpoint(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    words = [*(run.names + STEPS + METHOD).split(), "--model_save_path", str(tmp_path / "models")]
    words += ["--save_total_limit", "1", "--resume_from_checkpoint", "last"]
    stages = (_in_writing_weights, _in_step, _before_the_rename, _in_deleting_an_old_one, _before_the_summary)
    for stage in stages:
        assert exit_code(child, words, stage, output) == -signal.SIGKILL, output.read_text(encoding="utf-8")
        folder = run_folder_in(tmp_path / "models")
        assert not (folder / "training_summary.json").exists()
        assert all(fault_of(path) is None for path in folder.glob("checkpoint-*"))
    assert list(folder.glob("checkpoint-*")) == [folder / "checkpoint-8"]
    assert run(tmp_path / "models", f"{METHOD} --save_total_limit 1 --resume_from_checkpoint") == folder
    assert_same_run(folder, uninterrupted)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_may_differ_and_what_may_not(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    folder = interrupted_copy(uninterrupted, models, keep=(6,))
    with pytest.raises(UserError, match=r"unfinished run.\nGo on with it: --resume_from_checkpoint"):
        run(models, METHOD)
    with pytest.raises(UserError, match=r"--lora_r 4 \(there 8\), --learning_rate 0.1 \(there 0.005\)"):
        run(models, f"{METHOD} --learning_rate 0.1 --lora_r 4 --resume_from_checkpoint")
    with pytest.raises(UserError, match="leave one of them out"):
        run(models, f"{METHOD} --overwrite_output_dir --resume_from_checkpoint")
    with pytest.raises(UserError, match="there is no such checkpoint"):
        run(models, f"{METHOD} --resume_from_checkpoint {folder / 'checkpoint-7'}")
    foreign = shutil.copytree(folder / "checkpoint-6", tmp_path / "foreign" / "checkpoint-6")
    (foreign / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match="it was not written by this project"):
        run(models, f"{METHOD} --resume_from_checkpoint {foreign}")
    run(models, f"{METHOD} --save_steps 100 --num_workers 1 --resume_from_checkpoint {folder / 'checkpoint-6'}")
    assert not (folder / "checkpoint-8").exists()
    assert_same_run(folder, uninterrupted)


def test_moved_files_are_the_same_and_another_owner_s_model_is_not(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    words = ["--dataset_name_or_path", "owner/data", "--gradient_checkpointing"]
    arguments = parse_arguments([*words, "--model_name_or_path", str(model)])
    before = arguments.settings() | {"model_name_or_path": "/elsewhere/tiny", "gradient_checkpointing": False}
    check_same_run(arguments.settings(), before, "checkpoint-2")
    with pytest.raises(UserError, match=r"--dataset_name_or_path owner/data \(there other/data\)"):
        check_same_run(arguments.settings(), before | {"dataset_name_or_path": ["other/data"]}, "checkpoint-2")


@pytest.mark.parametrize(
    ("flags", "then", "refused"),
    [
        ("--streaming --max_steps 9", {"num_workers": 1}, False),  # one worker reads as the process itself does
        ("--streaming --max_steps 9", {"num_workers": 2}, True),
        ("--streaming --max_steps 9 --num_workers 3", {"num_workers": 2}, True),
        ("--streaming --max_steps 9 --num_workers 3", {"gradient_accumulation_steps": 4}, True),
        ("--streaming --max_steps 9", {"gradient_accumulation_steps": 4}, False),
        ("--num_workers 3", {"num_workers": 2, "gradient_accumulation_steps": 4}, False),
    ],
)
def test_what_changes_the_batches_of_a_stream_is_refused(flags: str, then: dict, refused: bool) -> None:
    """Several workers fill the places of dropped rows each with later rows of its own."""
    words = f"--model_name_or_path owner/model --dataset_name_or_path owner/data {flags}"
    arguments = parse_arguments(words.split())
    before = arguments.settings() | then
    if not refused:
        check_same_run(arguments.settings(), before, "checkpoint-2")
        return
    with pytest.raises(UserError, match="would be another run"):
        check_same_run(arguments.settings(), before, "checkpoint-2")


def test_another_number_of_processes_for_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    saved = {"batch": {"processes": 2}, "data": None, "versions": {}}
    for workers, data, refused in ((2, None, True), (1, None, False), (2, "digest", False)):
        trainer = SimpleNamespace(args=SimpleNamespace(world_size=1, dataloader_num_workers=workers))
        if refused:
            with pytest.raises(UserError, match=r"2 process\(es\), and 1 go on: with --streaming and several"):
                check_processes(trainer, saved | {"data": data})
        else:
            check_processes(trainer, saved | {"data": data})
            assert "but other dropout" in caplog.text


def test_rows_that_are_grouped_otherwise_are_another_run(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    """By the flag, and by what rows cost where a checkpoint's flags cannot tell."""
    checkpoint = interrupted_copy(uninterrupted, tmp_path, keep=(6,)) / "checkpoint-6"
    words = f"{METHOD} --group_by_length --resume_from_checkpoint"
    with pytest.raises(UserError, match=r"--group_by_length True \(there False\)"):
        run(tmp_path, words)
    saved = read_run_state(checkpoint)
    assert saved.pop("grouping") is None
    del saved["settings"]["group_by_length"]  # as of a version without the flag
    (checkpoint / RUN_STATE_NAME).write_text(json.dumps(saved), encoding="utf-8")
    (checkpoint / MANIFEST_NAME).unlink()
    seal(checkpoint)
    with pytest.raises(UserError, match="--group_by_length puts other rows together than when"):
        run(tmp_path, words)


def test_finished_run_has_nothing_to_go_on_with(run: Run, uninterrupted: Path) -> None:
    before = (uninterrupted / "training_summary.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        run(uninterrupted.parent, f"{METHOD} --resume_from_checkpoint last")
    assert ended.value.code == 0
    assert (uninterrupted / "training_summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"the finished run in .* was made with other flags"):
        run(uninterrupted.parent, f"{METHOD} --seed 1 --resume_from_checkpoint")


def test_other_data_under_the_same_name_is_refused(
    tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(alpaca_file, data)
    words = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {data} {STEPS} {METHOD}".split()
    words += ["--model_save_path", str(tmp_path / "models"), "--resume_from_checkpoint"]
    stop_at(monkeypatch, MICRO_BATCHES, die)
    with pytest.raises(Killed):
        tokentune.finetune.main(words)
    data.write_text(data.read_text(encoding="utf-8").replace("number is 3", "number is 4"), encoding="utf-8")
    with pytest.raises(UserError, match="the training data is not what it was"):
        tokentune.finetune.main(words)
