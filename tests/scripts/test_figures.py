"""The figures: drawn from small made-up results, and refused with a sentence where there are none."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tokentune.errors import UserError

FIGURES = Path(__file__).resolve().parents[2] / "scripts" / "figures"
sys.path.append(str(FIGURES))
FROM_STEPS = ["memory_by_proportion", "memory_by_length", "memory_breakdown", "time_by_memory"]
FROM_FOLDERS = ["evaluation", "loss_by_proportion"]
METHODS = ["full", "checkpointing", "tokentune", "tokentune_checkpointing"]
SHAPE = {"name": "tiny", "hidden_size": 8, "layers": 2, "heads": 4, "key_value_heads": 2, "batch": 1}


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def step_row(suite: str, method: str, size: int, **changes: object) -> dict:
    ratios = {"bytes_ratio_to_full": size / 1000, "time_ratio_to_full": [size / 2000, size / 1500, size / 1000]}
    static = {
        "weights_bytes": 4000,
        "gradients_bytes": 4000,
        "optimizer_bytes": 0,
        "saved_bytes": size,
        "peak_bytes": 8000 + size,
    }
    given = {"suite": suite, "method": method, "train": "full", "dtype": "float32", "proportion": None, "length": 512}
    return given | SHAPE | static | ratios | {"seconds": [0.1, 0.2, 0.3]} | changes


@pytest.fixture
def steps_file(tmp_path: Path) -> Path:
    """Results of the step benchmark with the suites that the figures read; one row did not fit in memory."""
    rows = []
    for train in ("full", "lora"):
        for method, size in zip(METHODS, (1000, 300, 500, 100), strict=True):
            shares = [0.1, 0.3, 1.0] if "tokentune" in method else [None]
            rows += [
                step_row("proportions", method, int(size * (p or 1)) + 1, proportion=p, train=train) for p in shares
            ]
            rows.append(step_row("table", method, size, train=train))
        rows.append({"suite": "table", "method": "tokentune_segments", "train": train, "error": "out of memory"})
    rows += [step_row("length", m, n * 2 + 9, length=n) for m in METHODS for n in (512, 1024, 2048)]
    fit = {"suite": "length", "quantity": "saved_bytes", "against": "length", "exponent": 1.25}
    report = {
        "machine": {"device": "a CPU", "threads": 2, "versions": {"torch": "2"}},
        "growth": [fit | {"method": m} for m in METHODS],
        "rows": rows,
    }
    path = tmp_path / "step.json"
    path.write_text(json.dumps(report))
    return path


@pytest.fixture
def results_folder(tmp_path: Path) -> Path:
    """lm-eval's files of a base and three runs; of one task also an older file."""
    folder = tmp_path / "results"
    runs = {"llama": 0.4, "llama-data": 0.5, "llama-data-lora": 0.6, "llama-data-lora-qlora-tokentune-0.3": 0.7}
    for name, share in runs.items():
        for date, value in (("2026-01-02T00-00-00.5", share), ("2026-01-01T00-00-00.5", 0.1)):
            write_scores(folder / name / "arc_challenge_25shot.json", date, "arc_challenge", value)
        groups = {"group_subtasks": {"mmlu": ["mmlu_a"], "mmlu_a": []}}
        write_scores(folder / name / "merged" / "mmlu_5shot.json", "2026-01-02T00-00-00.5", "mmlu", share / 2, groups)
    return folder


def write_scores(stem: Path, date: str, task: str, value: float, more: dict | None = None) -> None:
    results = {name: {"acc,none": value, "acc_norm,none": value, "acc_norm_stderr,none": 0.01} for name in (task,)}
    if more:
        results["mmlu_a"] = {"acc,none": 0.99}
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.stem}_{date}.json").write_text(json.dumps({"results": results} | (more or {})))


def write_summary(folder: Path, share: float | None, final: float, *, lora: bool = True) -> None:
    folder.mkdir(parents=True)
    settings = {"tokentune": share is not None, "prefix_length": str(share or 0.3), "lora": lora, "qlora": False}
    losses = {"loss": {"first": 3.0, "last": 2.0}, "validation_loss": {"base": 3.0, "final": final}}
    (folder / "training_summary.json").write_text(json.dumps({"settings": settings} | losses))


@pytest.mark.parametrize("name", FROM_STEPS)
def test_figures_of_steps(name: str, steps_file: Path, tmp_path: Path) -> None:
    module(name).draw(steps_file, tmp_path / "new" / "picture.png")
    assert is_picture(tmp_path / "new" / "picture.png")


@pytest.mark.parametrize("name", FROM_STEPS)
def test_a_file_without_their_rows_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    path.write_text('{"rows": [{"suite": "other"}]}')
    with pytest.raises(UserError, match="suite"):
        module(name).draw(path, tmp_path / "picture.png")
    path.write_text("not JSON")
    with pytest.raises(UserError, match="cannot be read"):
        module(name).draw(path, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("name", FROM_FOLDERS)
def test_an_empty_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        module(name).draw(tmp_path, tmp_path / "picture.png")


@pytest.mark.parametrize("name", FROM_STEPS + FROM_FOLDERS)
def test_a_missing_input_ends_the_command_with_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    figure, style = module(name), module("style")
    monkeypatch.setattr(sys, "argv", [name, "--input", str(tmp_path / "absent"), "--output", str(tmp_path / "p.png")])
    with pytest.raises(SystemExit) as stopped:
        style.command(figure.__doc__, Path("unused"), figure.draw, "unused.png")
    assert stopped.value.code == 2 and "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_a_command_draws(steps_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.png"
    command = [sys.executable, str(FIGURES / "memory_by_proportion.py"), "--input", str(steps_file)]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_picture(output) and f"written: {output}" in done.stdout


def test_memory_breakdown_of_an_estimate(tmp_path: Path) -> None:
    parts = {"weights": 4, "gradients": 4, "optimizer": 8, "activations": 3, "peak": 17}
    rows = [{"method": "TokenTune", "weights": "QLoRA", "bytes": {k: 2**30 * v for k, v in parts.items()}}]
    rows.append({"method": "full", "weights": "LoRA", "bytes": None, "reason": "refused"})
    settings = {"model": "llama-2-7b", "sequences": 1, "tokens": 2048, "prefix_length": "0.3"}
    settings |= {"precision": "bf16", "optim": "adamw_torch_fused"}
    path = tmp_path / "estimate.json"
    path.write_text(json.dumps({"settings": settings, "rows": rows}))
    (bar,), setting = module("memory_breakdown").read_bars(path)
    assert (bar.train, bar.method, bar.peak) == ("qlora", "tokentune", 17 * 2**30)
    assert bar.parts["activations"] == 3 * 2**30 and "2,048 tokens" in setting
    module("memory_breakdown").draw(path, tmp_path / "p.png")
    assert is_picture(tmp_path / "p.png")


def test_front_holds_what_nothing_beats() -> None:
    points = [(5, 1), (1, 9), (2, 4), (3, 4), (4, 6), (2, 5)]
    assert module("time_by_memory").front(points) == [(1, 9), (2, 4), (5, 1)]


def test_newest_results_count_and_groups_stand_for_their_tasks(results_folder: Path) -> None:
    scores = module("evaluation").read_scores(results_folder)
    assert scores["llama"]["arc_challenge"] == (0.4, 0.01)
    assert scores["llama-data-lora-qlora-tokentune-0.3"] == {"arc_challenge": (0.7, 0.01), "mmlu": (0.35, 0.0)}


def test_models_are_named_by_their_method(results_folder: Path) -> None:
    evaluation = module("evaluation")
    names = evaluation.run_names(sorted(path.name for path in results_folder.iterdir()))
    assert names == {
        "llama": "llama",
        "llama-data": "all weights",
        "llama-data-lora": "LoRA",
        "llama-data-lora-qlora-tokentune-0.3": "QLoRA + TokenTune, 0.3",
    }
    assert evaluation.run_names(["x-tokentune-0.2", "y-lora"]) == {
        "x-tokentune-0.2": "TokenTune, 0.2",
        "y-lora": "LoRA",
    }
    assert sorted(names.values(), key=evaluation.order)[0] == "llama"


def test_evaluation_is_drawn(results_folder: Path, tmp_path: Path) -> None:
    module("evaluation").draw(results_folder, tmp_path / "p.png")
    assert is_picture(tmp_path / "p.png")


def test_a_task_without_its_metric_is_refused(tmp_path: Path) -> None:
    report = {"results": {"mmlu": {"f1,none": 0.5}}}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mmlu_2026-01-01T00-00-00.5.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="mmlu has none of the metrics acc,none"):
        module("evaluation").read_scores(tmp_path)


def test_loss_by_proportion(tmp_path: Path) -> None:
    figure = module("loss_by_proportion")
    for share, final in ((0.1, 2.5), (0.3, 2.4), (None, 2.3)):
        write_summary(tmp_path / "models" / str(share), share, final)
    write_summary(tmp_path / "models" / "count", 16, 2.0)  # a number of tokens is no proportion
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("training_summary.json")}
    runs = {name: figure.proportion(run) for name, run in runs.items()}
    assert runs == {"0.1": (0.1, True), "0.3": (0.3, True), "None": (1.0, False), "count": None}
    figure.draw(tmp_path / "models", tmp_path / "p.png")
    assert is_picture(tmp_path / "p.png")
