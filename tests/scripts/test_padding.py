"""The count of padding: exact on made-up rows, and the report on tiny data."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "padding.py"


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_padding", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_batch_costs_what_its_largest_numbers_do(bench: ModuleType) -> None:
    """Four kinds of rows, two of which have one length, two one number of selected tokens, two one sum."""
    units = np.array([(20, 4), (20, 44), (60, 4), (60, 44)] * 64)
    found = bench.ratios(units, 4)
    assert found["by_both"] < min(found["by_length"], found["by_sum"]) < found["random"]
    one = np.array([[20, 4]] * 10 + [[60, 40]])
    assert bench.padded(one, np.zeros_like(one), 16, 0) == 11 * 100  # one micro-batch
    assert bench.padded(one, one, 1, 0) == one.sum() == 10 * 24 + 100  # a micro-batch of one row has no padding


def test_the_report(
    bench: ModuleType, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "padding.json"
    given = ["--output", output, "--model", tiny_llama_dir, "--data", alpaca_file]
    monkeypatch.setattr(sys, "argv", ["padding.py", *map(str, given)])
    bench.main()
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["data"]["rows"] == 16 and report["data"]["name"] == alpaca_file.name
    assert [(row["train"], row["selected"]) for row in report["rows"][::2]] == list(bench.CASES)
    for row in report["rows"]:
        assert all(row[order] >= 1 for order in ("random", "by_length", "by_sum", "by_both"))
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
