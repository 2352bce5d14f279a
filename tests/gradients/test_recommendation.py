"""The one sentence that a diagnosis ends in, and how its progress is told."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from tokentune.gradients import progress
from tokentune.gradients.recommendation import recommend
from tokentune.settings.diagnose import Setting


def result(strategy: str, proportion: float | str, seconds: float, effective: float | None, **changes: Any) -> dict:
    place = {"strategy": strategy, "correction": 0.0, "proportion": proportion, "saved_ratio": 0.4}
    return place | {"seconds": seconds, "whole": {"effective_batch": effective}} | changes


def recommended(*results: dict, failing: Sequence[tuple[dict, str]] = ()) -> dict:
    warnings = [{"sign": sign} | {name: of[name] for name in Setting._fields} for of, sign in failing]
    return recommend({"seconds": 2.0}, results, warnings)


def test_the_recommendation_gets_the_most_out_of_the_time() -> None:
    few, some = result("random", 0.1, 0.8, 0.3), result("supervised", 0.3, 1.2, 0.9)
    found = recommended(few, some, result("random", 1.0, 0.5, 1.0, saved_ratio=1.0))  # all tokens
    assert (found["strategy"], found["correction"], found["proportion"]) == ("supervised", 0.0, 0.3)
    assert (found["time_ratio"], found["saved_ratio"], found["pays_in_time"]) == (0.6, 0.4, True)
    assert found["message"] == (
        "--selection supervised --prefix_length 0.3: a step takes 0.60 of the time of full training and 40% of the "
        "bytes for its backward pass (measured here), and its gradient is as precise as one over 90% of the rows: 1.50 "
        "times as much for the time"
    )
    found = recommended(few, some, failing=[(some, "direction")])
    assert (found["strategy"], found["proportion"], found["pays_in_time"]) == ("random", 0.1, False)
    assert found["message"].startswith(
        "full training, where it fits into memory: it gets the most out of the time; else --"
    )
    assert recommended(few, some, failing=[(some, "memory")])["strategy"] == "supervised"  # the time is what it is
    answers = result("supervised", "answers+0.1", 1.0, 0.9, correction=1.0)
    words = "--selection supervised --prefix_length answers+0.1 --gradient_correction 1: a step takes"
    assert recommended(answers, few)["message"].startswith(words)


@pytest.mark.parametrize(
    ("results", "failing", "reason"),
    [
        ([result("random", 0.05, 0.8, 0.3)], "proportion", "selects too little (see the warnings): compare larger"),
        ([result("random", 0.3, 0.8, None)], None, "so few rows do not tell how noisy a gradient is: take more --rows"),
        ([result("random", 0.9, 1.95, 0.9, saved_ratio=0.97)], None, "no selection that was compared saves time or"),
    ],
)
def test_where_nothing_can_be_recommended_it_is_said(results: list[dict], failing: str | None, reason: str) -> None:
    found = recommended(*results, failing=[(of, failing) for of in results if failing])
    assert found.pop("message").startswith("none: ") and set(found.values()) == {None}
    assert reason in recommended(*results, failing=[(of, failing) for of in results if failing])["message"]


def test_progress_is_told_by_batches_and_in_a_log_by_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, logger="tokentune"), progress.Progress(8) as bar:
        for _ in range(4):
            now[0] += 16
            bar.tick()
    assert [record.getMessage() for record in caplog.records] == [
        "gradients: 2 of 8 batches, about 01:36 left",
        "gradients: 4 of 8 batches, about 01:04 left",
    ]
    assert capsys.readouterr().err == ""  # no bar where there is no terminal
