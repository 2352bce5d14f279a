"""The training summary: losses as means over windows of steps, the curve that shows them, the phases' times."""

import logging
import time

import pytest
from matplotlib import pyplot

from tokentune import phases
from tokentune.phases import phase
from tokentune.reports.summary import draw_curves, smooth, window_of


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (2, 1), (8, 4), (20, 10), (68, 10), (1000, 100)])
def test_a_window_is_a_tenth_of_the_steps_or_ten(steps: int, window: int) -> None:
    assert window_of(steps) == window


def test_a_window_is_the_mean_of_its_steps_losses() -> None:
    """Whatever the log entries are, each of which is a mean itself: here of 1, 2, 3 and 2 steps."""
    losses = [8.0, 5.0, 3.0, 2.0, 2.0, 5.0, 1.0, 3.0]
    entries, begin = [], 0
    for end in (1, 3, 6, 8):
        entries.append({"step": end, "loss": sum(losses[begin:end]) / (end - begin)})
        begin = end
    means = smooth(entries, "loss", 4)
    assert means[:2] == [None, None]
    assert means[2:] == pytest.approx([sum(losses[1:6]) / 5, sum(losses[3:8]) / 5])  # whole entries: five steps each
    assert smooth(entries, "loss", 1) == pytest.approx([entry["loss"] for entry in entries])


def test_the_curve_ends_at_the_last_window(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose single batches read 3.27 at first and 3.73 at last, and which learnt all the same."""
    losses = [3.27, *(4.5 - step / 20 for step in range(1, 39)), 3.73]
    figures = {"learning_rate": 1e-4, "grad_norm": 1.0, "memory_peak_bytes": 2**30, "memory_allocated_bytes": 2**29}
    log = [{"step": step, "loss": loss} | figures for step, loss in enumerate(losses, start=1)]
    window = window_of(len(log))
    for entry, mean in zip(log, smooth(log, "loss", window), strict=True):
        entry["loss_smoothed"] = mean
    loss = {"first": log[window - 1]["loss_smoothed"], "last": log[-1]["loss_smoothed"], "window": window}
    assert loss["first"] - loss["last"] > 1
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    summary = {"log": log, "device": {"type": "cpu"}, "loss": loss, "validation_loss": None, "run_folder": "run"}
    assert draw_curves(summary, tmp_path).is_file()
    raw, smoothed = pyplot.gcf().axes[0].get_lines()
    assert raw.get_alpha() < 0.5 and list(raw.get_ydata()) == losses
    assert (smoothed.get_ydata()[0], smoothed.get_ydata()[-1]) == (loss["first"], loss["last"])
    assert smoothed.get_label() == "training, mean of 10 steps"
    monkeypatch.undo()
    pyplot.close("all")


def test_phases_count_for_themselves_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A line each when they end, with those within them; a failed one gives none."""
    phases.start_clock()
    with caplog.at_level(logging.INFO, "tokentune"):
        with phase("load"):
            pass
        with phase("train"):
            for _ in range(2):
                with phase("evaluate"):
                    time.sleep(0.06)
        with pytest.raises(ValueError, match="no"), phase("save"):
            raise ValueError("no")
    assert [record.message for record in caplog.records] == ["time: load 0.0 s", "time: train 0.0 s, evaluate 0.1 s"]
    found = phases.times()
    assert list(found["phases"]) == ["load", "train", "evaluate", "save"]
    assert found["phases"]["train"] < 0.05 < 0.11 < found["phases"]["evaluate"]
    assert sum(found["phases"].values()) <= found["wall_seconds"]
    assert phases.times()["phases"] == {}
