"""Room on the disk: what is told before the first step is what the run then writes."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_trainer import make_rows

from tokentune.errors import UserError
from tokentune.training.checkpoints.disk_space import DiskSpace, bytes_in, disk_space
from tokentune.training.checkpoints.resuming import Start
from tokentune.training.checkpoints.saving import checkpoints_of
from tokentune.training.optimizers import state_bytes
from tokentune.training.result import save_result
from tokentune.training.trainer import SelectiveTrainer

Make = Callable[..., SelectiveTrainer]
STEPS = "--global_batch_size 3 --save_steps 2 --save_total_limit 1"  # 7 steps on 19 rows


@pytest.mark.parametrize("words", ["", "--base_dtype bfloat16", "--optim sgd", "--lora --lora_r 64"])
def test_a_checkpoint_and_the_result_are_as_large_as_told(words: str, make_trainer: Make, tmp_path: Path) -> None:
    trainer, folder = make_trainer(f"{STEPS} {words}"), tmp_path / "run"
    space = disk_space(trainer, folder, torch.bfloat16, Start())
    trainer.train()
    save_result(trainer, folder, torch.bfloat16)
    weights = next(folder.glob("*model.safetensors")).stat().st_size
    written = sum(
        next(folder.glob(f"checkpoint-6/{name}")).stat().st_size for name in ("*model.safetensors", "optimizer.pt")
    )
    assert weights == pytest.approx(space.result, rel=0.05)
    assert written == pytest.approx(space.checkpoint, rel=0.1)
    assert (space.most, space.adapters) == (2, "--lora" in words)


def test_only_what_is_there_at_once_is_counted(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))

    def space(words: str, start: Start | None = None, **options: int) -> DiskSpace:
        validation = make_rows(3) if "eval_steps" in words else None
        return disk_space(
            make_trainer(words, eval_rows=validation), tmp_path / "run", torch.float32, start or Start(), **options
        )

    none = space("--global_batch_size 3")  # its save_steps are more than its steps
    assert none.most == 0 and none.needed == none.result
    one = space("--global_batch_size 3 --save_steps 5")
    assert one.most == 1 and one.needed == one.checkpoint + one.result
    two = space(STEPS)
    assert two.most == 2 and two.needed == 2 * two.checkpoint > two.checkpoint + two.result
    assert space("--global_batch_size 3", results=3).needed == pytest.approx(3 * none.result, abs=3)
    best = "--eval_dataset_name_or_path rows.jsonl --eval_steps 3 --load_best_model_at_end"
    assert space(f"{STEPS} {best}").most == 3  # the best one, the newest one, and the next
    assert space(f"--global_batch_size 3 --save_total_limit 1 {best}").most == 2  # the best one, and a better one

    make_trainer(STEPS).train()
    (checkpoint,) = checkpoints_of(tmp_path / "run")
    there = bytes_in(checkpoint)
    assert there > two.checkpoint / 1.1
    resumed = space(STEPS, Start(checkpoint, in_place=True))
    assert resumed.needed == two.needed - there
    replaced = space(STEPS)  # what is cleared away first is free
    assert replaced.needed == two.needed and replaced.free == resumed.free + there == 10**9 + there


def test_what_does_not_fit_is_refused_or_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    gib = 2**30
    sizes = {"folder": Path("models/a"), "result": 2 * gib, "checkpoint": 6 * gib, "most": 3, "needed": 18 * gib}
    caplog.set_level(logging.WARNING)
    enough = DiskSpace(**sizes, free=18 * gib, adapters=False)
    enough.check()
    assert enough.shortage is None and not caplog.text
    assert (
        str(enough) == "up to 3 checkpoints of about 6.00 GiB at once, a result of about 2.00 GiB; 18.00 GiB are free"
    )
    DiskSpace(**sizes, free=17 * gib, adapters=False).check()
    assert "checkpoints may not fit: up to 3 of about 6.00 GiB are there at once" in caplog.text
    assert "17.00 GiB are free on the disk of models/a" in caplog.text and "--save_total_limit" in caplog.text
    for adapters in (False, True):
        with pytest.raises(UserError, match=r"it takes about 2\.00 GiB, and 1\.00 GiB are free") as refused:
            DiskSpace(**sizes, free=gib, adapters=adapters).check()
        assert ("--lora" in str(refused.value)) != adapters


def test_bytes_of_an_optimizer_s_states(make_trainer: Make) -> None:
    """Of torch's Adam two numbers of the weight's type each, and a counter for the matrix."""
    settings = make_trainer("").args
    assert state_bytes(make_trainer("--optim adafactor").args, torch.float32) < 0.1  # sums of rows and columns
    assert state_bytes(settings, torch.float32) == pytest.approx(8, rel=1e-3)
    assert state_bytes(settings, torch.bfloat16) == pytest.approx(4, rel=1e-3)
