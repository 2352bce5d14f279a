"""Runs that are asked to end, or started twice: they say so, keep what they have, and end the same when resumed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killable_runs import (
    CHILDREN,
    METHOD,
    MICRO_BATCHES,
    STEPS,
    Run,
    assert_same_run,
    child,
    exit_code,
    run,
    run_folder_in,
    stop_at,
    uninterrupted,
)

import tokentune.finetune
import tokentune.training.checkpoints.saving
import tokentune.training.resumable_trainer
from tokentune.cli.command import run_command
from tokentune.errors import UserError
from tokentune.training.checkpoints.run_lock import locked
from tokentune.training.checkpoints.saving import fault_of
from tokentune.training.distributed.interruptions import Interrupted
from tokentune.training.trainer import SelectiveTrainer


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
    holder = CHILDREN.Process(target=hold, args=(folder,))
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
