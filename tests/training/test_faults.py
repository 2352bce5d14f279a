"""Damaged checkpoints, a full disk and a loss that is no number: no run is lost."""

import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from killable_runs import METHOD, Run, assert_same_run, interrupted_copy, run, run_folder_in, uninterrupted

import tokentune.finetune
import tokentune.training.checkpoints.saving
import tokentune.training.checkpoints.writing
import tokentune.training.loop
from tokentune.errors import UserError
from tokentune.file_modes import with_usual_modes
from tokentune.training.checkpoints.saving import MANIFEST_NAME, fault_of
from tokentune.training.trainer import SelectiveTrainer


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
    real = tokentune.training.loop.write_checkpoint

    def save(trainer: SelectiveTrainer, *args: object) -> bool:
        full_disk(size if trainer.state.global_step in (4, 6) else None)
        written = real(trainer, *args)
        full_disk(None)
        return written

    monkeypatch.setattr(tokentune.training.loop, "write_checkpoint", save)
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
