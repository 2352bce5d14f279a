"""Runs that are killed, interrupted, short of disk space or started twice: none is lost, and all end the same."""

import gc
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import tokentune.finetune
import tokentune.runs.checkpoints
import tokentune.runs.resumable_trainer
from tokentune.arguments import parse_arguments
from tokentune.errors import UserError, run_command
from tokentune.runs.checkpoints import MANIFEST_NAME, fault_of, with_usual_modes
from tokentune.runs.interruptions import Interrupted
from tokentune.runs.resuming import check_same_run
from tokentune.runs.run_lock import locked
from tokentune.training import SelectiveTrainer

# Windows of 3, 3 and 2 micro-batches of 2 rows: 3 steps in an epoch, 9 in the run.
STEPS = (
    "--global_batch_size 6 --gradient_accumulation_steps 3 --num_epochs 3 --warmup_steps 1 --learning_rate 5e-3 "
    "--max_length 128 --report_to none --logging_steps 4 --save_steps 2 --skip_verification --data_cache none "
)
METHOD = "--lora --tokentune --prefix_length 0.3 --skip_memory_probe"  # with dropout
MICRO_BATCHES = 8  # of an epoch


class Killed(BaseException):
    """Ends a run in this process without giving it any time, as SIGKILL does."""


Run = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, alpaca_file: Path) -> Iterator[Run]:
    """Runs the command, in this process, into a folder for models; returns the run's own folder."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tokentune.finetune, "draw_curves", lambda *args: None)  # a second for each run
    names = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {alpaca_file} --eval_steps 3 "
    names += f"--eval_dataset_name_or_path {alpaca_file} "
    gc.collect()
    gc.freeze()  # the Trainer collects all that was ever imported, again and again

    def run(folder: Path, words: str) -> Path:
        tokentune.finetune.main([*(names + STEPS + words).split(), "--model_save_path", str(folder)])
        return run_folder_in(folder)

    run.names = names
    yield run
    patch.undo()


@pytest.fixture(scope="module")
def uninterrupted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("uninterrupted"), METHOD)


def run_folder_in(folder: Path) -> Path:
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


def assert_same_run(folder: Path, expected: Path) -> None:
    """Weights to the last bit, and the same figures but for times and memory."""
    (name,) = [path.name for path in expected.glob("*.safetensors")]
    weights, reference = load_file(folder / name), load_file(expected / name)
    assert weights.keys() == reference.keys()
    assert [key for key in weights if not torch.equal(weights[key], reference[key])] == []
    figures = [json.loads((path / "training_summary.json").read_text(encoding="utf-8")) for path in (folder, expected)]
    for name in ("tokens", "validation_loss", "optimizer_steps", "loss", "saved_for_backward_bytes"):
        assert figures[0][name] == figures[1][name], name
    logs = [[(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in f["log"]] for f in figures]
    assert logs[0] == logs[1]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def stop_at(patch: pytest.MonkeyPatch, micro_batch: int, stop: Callable[[], None]) -> None:
    """Calls `stop` before the given micro-batch of this process, from 0."""
    real, count = SelectiveTrainer.training_step, iter(range(10_000))

    def step(trainer: SelectiveTrainer, *args: object) -> torch.Tensor:
        if next(count) == micro_batch:
            stop()
        return real(trainer, *args)

    patch.setattr(SelectiveTrainer, "training_step", step)


def die() -> None:
    raise Killed


# ---- every method goes on to the last bit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "--tokentune --prefix_length 0.3 --num_workers 2",
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

_children = multiprocessing.get_context("forkserver")  # has imported everything, and has no threads that a fork loses
_children.set_forkserver_preload(["tokentune.finetune", "peft", "transformers.models.llama.modeling_llama"])


def kill_myself(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_step(patch: pytest.MonkeyPatch) -> None:
    stop_at(patch, 11, kill_myself)


def _in_writing_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SelectiveTrainer, "_save_states", kill_myself)


def _before_the_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tokentune.runs.resumable_trainer, "publish", kill_myself)


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


def child(words: list[str], prepare: Callable[[pytest.MonkeyPatch], None] | None, output: Path) -> None:
    """A run in a process of its own, which takes what `prepare` does to it; what it says goes into a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()
    multiprocessing.set_start_method("fork", force=True)  # for data loader workers, as anywhere else
    if prepare is not None:
        prepare(pytest.MonkeyPatch())
    run_command(lambda: tokentune.finetune.main(words))


def exit_code(target: Callable, *args: object) -> int:
    process = _children.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


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


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def interrupted_copy(uninterrupted: Path, folder: Path, *, keep: tuple[int, ...]) -> Path:
    """The folder that a run killed after step 8 leaves, with the checkpoints of these steps."""
    copy = folder / uninterrupted.name
    for step in keep:
        shutil.copytree(uninterrupted / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    return copy


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_whole_checkpoint_lists_all_its_files(uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "checkpoint-8"
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "run_state.json"} < set(manifest)
    assert set(manifest) | {MANIFEST_NAME} == {path.name for path in checkpoint.iterdir()}
    assert fault_of(checkpoint) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST_NAME])
def test_damage_is_seen(name: str, uninterrupted: Path, tmp_path: Path) -> None:
    for number, damage in enumerate((truncate, flip_a_bit, Path.unlink)):
        checkpoint = shutil.copytree(uninterrupted / "checkpoint-8", tmp_path / str(number))
        damage(checkpoint / name)
        fault = fault_of(checkpoint)
        assert fault is not None and (name in fault or name == MANIFEST_NAME)  # a wrong manifest blames the files


def test_damaged_checkpoints_are_passed_over_and_kept(
    run: Run, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted_copy(uninterrupted, tmp_path, keep=(2, 4, 6, 8))
    truncate(folder / "checkpoint-8" / "optimizer.pt")
    flip_a_bit(folder / "checkpoint-6" / "adapter_model.safetensors")
    monkeypatch.setattr(logging.getLogger("tokentune"), "propagate", True)
    run(tmp_path, f"{METHOD} --resume_from_checkpoint")
    assert "checkpoint-8 is damaged: optimizer.pt has" in caplog.text and "going on from" in caplog.text
    assert "checkpoint-6 is damaged: adapter_model.safetensors has other bytes than were written" in caplog.text
    assert {path.name for path in folder.glob("broken-*")} == {"broken-checkpoint-6", "broken-checkpoint-8"}
    assert_same_run(folder, uninterrupted)


def test_replaced_checkpoint_is_found_again(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    """Killed between taking the old checkpoint's name away and giving it to the new one."""
    folder = interrupted_copy(uninterrupted, tmp_path, keep=(4,))
    (folder / "checkpoint-4").rename(folder / ".checkpoint-4.replaced")
    shutil.copytree(uninterrupted / "checkpoint-6", folder / ".checkpoint-6.partial")
    run(tmp_path, f"{METHOD} --resume_from_checkpoint")
    assert (folder / "checkpoint-4").is_dir()
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
    check_same_run(arguments, before, "checkpoint-2")
    with pytest.raises(UserError, match=r"--dataset_name_or_path owner/data \(there other/data\)"):
        check_same_run(arguments, before | {"dataset_name_or_path": ["other/data"]}, "checkpoint-2")


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


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[Callable[[int | None], None]]:
    """Sets how long a file may become, in bytes, which fails as a full disk does; None: as long as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [3_000, 30_000], ids=["weights", "optimizer"])
def test_full_disk_costs_a_checkpoint_and_not_the_run(
    size: int,
    run: Run,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_disk: Callable[[int | None], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = SelectiveTrainer._save_checkpoint

    def save(trainer: SelectiveTrainer, *args: object) -> None:
        full_disk(size if trainer.state.global_step in (4, 6) else None)
        real(trainer, *args)
        full_disk(None)

    monkeypatch.setattr(SelectiveTrainer, "_save_checkpoint", save)
    monkeypatch.setattr(logging.getLogger("tokentune"), "propagate", True)
    folder = run(tmp_path, METHOD)
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2
    assert "checkpoint-6 could not be written" in said[1] and "checkpoint-2 is kept; training goes on" in said[1]
    assert {path.name for path in folder.glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    assert_same_run(folder, uninterrupted)


def test_result_that_does_not_fit_looks_unfinished(
    run: Run,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_disk: Callable[[int | None], None],
) -> None:
    real = tokentune.finetune.save_result

    def save(*args: object) -> dict:
        full_disk(3_000)
        return real(*args)

    monkeypatch.setattr(tokentune.finetune, "save_result", save)
    with pytest.raises(UserError, match=r"(?s)could not be written.*checkpoint-8.*--resume_from_checkpoint"):
        run(tmp_path, METHOD)
    full_disk(None)
    folder = run_folder_in(tmp_path)
    assert not list(folder.glob("adapter*")) and not list(folder.glob("training_summary*"))
    monkeypatch.undo()
    run(tmp_path, f"{METHOD} --resume_from_checkpoint")
    assert_same_run(folder, uninterrupted)


# ---- asked to end ----------------------------------------------------------------------------------------------------


def interrupted_run(run: Run, folder: Path, words: str = METHOD) -> Interrupted:
    with pytest.raises(Interrupted) as ended:
        run(folder, words)
    return ended.value


def test_sigterm_in_a_step_ends_it_with_a_checkpoint(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, MICRO_BATCHES + 4, lambda: signal.raise_signal(signal.SIGTERM))  # of step 5
        ended = interrupted_run(run, tmp_path)
    assert str(ended).startswith("interrupted by SIGTERM after step 5, which is saved in")
    assert "--resume_from_checkpoint" in str(ended)
    assert fault_of(run_folder_in(tmp_path) / "checkpoint-5") is None
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same_run(run(tmp_path, f"{METHOD} --resume_from_checkpoint"), uninterrupted)


def interrupted_after_a_batch(evaluation: Callable) -> Callable:
    def batches(loader: Iterator) -> Iterator:
        for number, batch in enumerate(loader):
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    return lambda trainer, loader: evaluation(trainer, batches(loader))


@pytest.mark.parametrize("evaluation", [0, 1, 3], ids=["before training", "in training", "at the end"])
def test_sigterm_in_a_validation_ends_it_and_makes_it_later(
    evaluation: int, run: Run, uninterrupted: Path, tmp_path: Path
) -> None:
    real = SelectiveTrainer.evaluate
    with pytest.MonkeyPatch.context() as patch:

        def evaluate(trainer: SelectiveTrainer, **options: object) -> dict:
            if len(trainer.evaluations) == evaluation:
                trainer.evaluation = interrupted_after_a_batch(trainer.evaluation)
            return real(trainer, **options)

        patch.setattr(SelectiveTrainer, "evaluate", evaluate)
        ended = interrupted_run(run, tmp_path)
    assert ended.signal_number == signal.SIGTERM
    step = 3 * evaluation
    saved = [path.name for path in run_folder_in(tmp_path).glob(f"checkpoint-{step}")]
    assert saved == ([f"checkpoint-{step}"] if step else [])
    assert_same_run(run(tmp_path, f"{METHOD} --resume_from_checkpoint"), uninterrupted)


def test_signal_before_training_ends_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tokentune.finetune, "prepare_model", lambda *args, **options: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: run(tmp_path / "models", METHOD))
    assert ended.value.code == 130
    assert list(tmp_path.iterdir()) == []


def _two_signals(patch: pytest.MonkeyPatch) -> None:
    stop_at(patch, 4, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])


def _one_signal(patch: pytest.MonkeyPatch) -> None:
    stop_at(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))


def test_exit_codes_and_sentences(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    """A second Ctrl-C ends the process on the spot; one SIGTERM lets it finish its step, with workers about."""
    output = tmp_path / "output.txt"
    words = [*(run.names + STEPS + METHOD).split(), "--model_save_path", str(tmp_path / "models")]
    words.append("--resume_from_checkpoint")
    assert exit_code(child, words, _two_signals, output) == 130
    assert "ended at once" in output.read_text(encoding="utf-8")
    assert exit_code(child, [*words, "--num_workers", "2"], _one_signal, output) == 143
    assert "Go on with the same command and --resume_from_checkpoint." in output.read_text(encoding="utf-8")
    assert "Traceback" not in output.read_text(encoding="utf-8")
    assert_same_run(run(tmp_path / "models", f"{METHOD} --resume_from_checkpoint"), uninterrupted)


# ---- the lock --------------------------------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    with locked(folder):
        (folder.parent / "held").touch()
        time.sleep(60)


def test_two_runs_into_one_folder_refuse_each_other(run: Run, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / uninterrupted.name
    holder = _children.Process(target=hold, args=(folder,))
    holder.start()
    while not (folder.parent / "held").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    with pytest.raises(
        UserError, match=rf"another run is writing to .*: process {holder.pid} on {os.uname().nodename}"
    ):
        run(tmp_path / "models", METHOD)
    assert not folder.exists()
    holder.kill()
    holder.join()
    with locked(folder):  # SIGKILL has left the file, and no lock
        assert (folder.parent / f".{folder.name}.lock").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["held"]


def test_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "models" / "run"):
        assert (tmp_path / "new" / "models" / ".run.lock").is_file()
    assert list(tmp_path.iterdir()) == []


# ---- a loss that is no number ----------------------------------------------------------------------------------------


def test_batch_of_a_nan_loss_is_written_down(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again from its place in the second epoch: rows, draw and all."""
    real, seen = SelectiveTrainer.training_step, []

    def step(trainer: SelectiveTrainer, model: torch.nn.Module, inputs: dict, *args: object) -> torch.Tensor:
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        if len(seen) == 13:
            monkeypatch.setattr(SelectiveTrainer, "compute_loss", lambda *args, **options: torch.tensor(
                float("nan"), requires_grad=True))  # fmt: skip
        return real(trainer, model, inputs, *args)

    monkeypatch.setattr(SelectiveTrainer, "training_step", step)
    with pytest.raises(UserError, match=r"at step 5: stopped. The batch is in .*nan_batch.json"):
        run(tmp_path, METHOD)
    facts = json.loads((run_folder_in(tmp_path) / "nan_batch.json").read_text(encoding="utf-8"))
    assert (facts["step"], facts["micro_batch"], len(facts["rows"])) == (5, 2, 2)
    batch = seen[12]
    for index, sequence in enumerate(facts["sequences"]):
        length = int(batch["attention_mask"][index].sum())
        assert sequence["input_ids"] == batch["input_ids"][index][:length].tolist()
        assert sequence["labels"] == batch["labels"][index][:length].tolist()
        assert set(sequence["selected_positions"]) <= set(batch["selected_positions"][index].tolist())
        assert "### Response:" in sequence["text"] and sequence["row"] == facts["rows"][index]


def test_weights_have_the_permissions_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).touch(mode=0o600)
    monkeypatch.setattr(Path, "chmod", Mock(side_effect=PermissionError))  # a share without permissions
    with_usual_modes(tmp_path)
    monkeypatch.undo()
    with_usual_modes(tmp_path)
    (tmp_path / "new").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1 and len(list(tmp_path.iterdir())) == 3
