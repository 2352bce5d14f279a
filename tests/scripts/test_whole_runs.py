"""Whole runs side by side: the commands that they are, and what is made of their summaries."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tokentune.cli.arguments import parse_arguments

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "whole_runs.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("bench_whole_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_differ_in_what_is_selected_and_in_checkpointing_alone(bench: ModuleType) -> None:
    found = {}
    for name, words in bench.METHODS.items():
        line = f"--model_name_or_path m --dataset_name_or_path d {bench.COMMON} {words}"
        given = parse_arguments(line.split()).settings()
        found[name] = {flag: str(value) for flag, value in given.items()}
    own = {
        "tokentune",
        "prefix_length",
        "gradient_checkpointing",
        "chunked_loss",
    }
    full = found["full"]
    for name, settings in found.items():
        assert {flag for flag in settings if settings[flag] != full[flag]} <= own, name


def test_speeds_are_compared_within_a_round(bench: ModuleType) -> None:
    def summary(speed: float) -> dict:
        return {
            "tokens_per_second": speed,
            "tokens": {"processed": 10},
            "saved_for_backward_bytes": 1,
            "training_seconds": 10 / speed,
        }

    speeds = {"full": (10.0, 20.0, 10.0), "checkpointing": (5.0, 5.0, 5.0), "answers": (20.0, 40.0, 30.0)}
    rows = bench.rows_of({name: [summary(speed) for speed in found] for name, found in speeds.items()})
    ratios = {row["method"]: row.get("speed_ratio") for row in rows}
    assert ratios == {"full": None, "checkpointing": None, "answers": [2.0, 2.0, 3.0]}
    half = bench.rows_of({"full": [summary(1.0)] * 2, "answers": [summary(2.0)]})  # a round that was cut short
    assert "speed_ratio" not in half[1]
