"""The benchmark of gradient quality and its picture, on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tokentune.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> object:
    file = SCRIPTS / path
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_add_up_in_one_file_that_is_drawn(
    tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench/gradient_quality.py", monkeypatch)
    output = tmp_path / "quality.json"

    def run(*words: str) -> dict:
        given = ["--output", output, "--model", tiny_llama_dir, "--data", alpaca_file, "--max_length", "64"]
        monkeypatch.setattr(sys, "argv", ["gradient_quality.py", *map(str, given), *words])
        bench.main()
        return json.loads(output.read_text(encoding="utf-8"))

    small = ("--rows", "4", "--draws", "2")
    run(*small, "--parts", "random 0.3")
    report = run(*small, "--parts", "random 0.3", "top 0.3", "--keep")
    assert list(report["parts"]) == ["random 0.3", "top 0.3"]
    found = [(result["strategy"], result["correction"], result["draw"]) for result in report["results"]]
    assert found == [("random", 0, None), ("random", 1, None), *((name, 0, "top") for name in bench.SCORED)]
    assert str(tmp_path) not in json.dumps({name: part for name, part in report.items() if name != "asked"})
    with pytest.raises(UserError, match="other rows"):
        run("--rows", "5", "--draws", "2", "--parts", "half corrected 0.3", "--keep")

    figure = script("figures/gradient_quality.py", monkeypatch)
    figure.draw(output, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty.json"
    empty.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no results"):
        figure.draw(empty, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
