"""`scripts/eval/report.py` and `all.sh`: the five tasks of a base and of what was trained from it, side by side."""

import importlib.util
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from bash_scripts import ROOT, call

sys.path.append(str(ROOT / "scripts" / "eval"))
from lm_eval_results import METRICS, read_results

from tokentune.cli.command import run_command
from tokentune.errors import UserError

REPORT = ROOT / "scripts" / "eval" / "report.py"
RUN = "llama-data-lora-tokentune-0.3"
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 0}


def result_file(task: str, share: float, *, limit: float | None = None, shots: int | None = None) -> dict:
    """What lm-eval 0.4.13 writes of one task, less what nobody reads."""
    figures = {"alias": task, "acc,none": share, "acc_stderr,none": 0.01, "sample_len": 100}
    if METRICS[task][0] == "acc_norm,none":
        figures |= {"acc,none": 0.99, "acc_norm,none": share, "acc_norm_stderr,none": 0.02}
    results, groups, counted = {task: figures}, {task: []}, {task: SHOTS[task] if shots is None else shots}
    if task == "mmlu":  # a group of groups, whose own shots are not told
        figures["acc_stderr,none"] = "N/A"
        results |= {"mmlu_stem": {"acc,none": 0.98}, "mmlu_anatomy": {"acc,none": 0.97}}
        groups = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy"]}
        counted = {"mmlu_anatomy": 5}
    config = {"model": "hf", "limit": limit}
    return {"results": results, "group_subtasks": groups, "n-shot": counted, "config": config, "date": 1.7e9}


def write(folder: Path, task: str, share: float, date: str = "2026-03-01T10-00-00.123456", **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}_{SHOTS[task]}shot_{date}.json"
    path.write_text(json.dumps(result_file(task, share, **options)))  # type: ignore[arg-type]
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """All five tasks of the base, all but one of the merged run."""
    folder = tmp_path / "results"
    for at, task in enumerate(METRICS):
        write(folder / "llama", task, 0.3 + at / 100)
        if task != "hellaswag":
            write(folder / RUN / "merged", task, 0.4 + at / 100)
    return folder


def report(*words: object) -> SimpleNamespace:
    """The command, in this process: what it printed and its exit code."""
    spec = importlib.util.spec_from_file_location("eval_report", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(REPORT), *map(str, words)])
        try:
            run_command(module.main)
        except SystemExit as stopped:
            code = stopped.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def cells(text: str) -> dict[str, list[str]]:
    """First cell of each line of a Markdown table -> the others."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_both_models_side_by_side_in_markdown(results: Path) -> None:
    done = report("--results", results, "--markdown")
    assert done.returncode == 0, done.stderr
    table = cells(done.stdout)
    assert table["task"] == ["metric", "llama", "LoRA + TokenTune, 0.3", "difference"]
    assert table["ARC-challenge, 25-shot"] == ["acc_norm", "30.0 ± 2.0", "40.0 ± 2.0", "+10.0"]
    assert table["HellaSwag, 10-shot"] == ["acc_norm", "31.0 ± 2.0", "missing", "missing"]
    assert table["MMLU, 5-shot"] == ["acc", "32.0", "42.0", "+10.0"]  # the harness gives groups no error of their own
    assert table["WinoGrande, 0-shot"] == ["acc", "34.0 ± 1.0", "44.0 ± 1.0", "+10.0"]
    assert table["mean of the five"] == ["", "32.0", "missing", "missing"]
    write(results / RUN / "merged", "hellaswag", 0.5)
    assert cells(report("--results", results, "--markdown").stdout)["mean of the five"] == ["", "32.0", "43.8", "+11.8"]


def test_newest_file_counts_and_every_figure_has_its_source(results: Path) -> None:
    newest = write(results / "llama", "mmlu", 0.6, date="2026-03-02T00-00-00.5")
    write(results / "llama", "mmlu", 0.1, date="2025-12-31T23-59-59.9")
    (results / "llama" / "samples_mmlu_2026-03-03.jsonl").write_text("{}")
    done = report("--results", results, "--json")
    assert done.returncode == 0, done.stderr
    base, merged = json.loads(done.stdout)["models"]
    assert base["name"] == "llama" and base["tasks"]["mmlu"]["path"] == str(newest)
    assert base["tasks"]["mmlu"] | {"path": ""} == {
        "score": 0.6, "stderr": None, "metric": "acc", "shots": 5, "limit": None, "path": "",
    }  # fmt: skip
    assert merged["called"] == "LoRA + TokenTune, 0.3"
    assert merged["tasks"]["hellaswag"] is None and merged["mean"] is None
    assert base["mean"] == pytest.approx((0.3 + 0.31 + 0.6 + 0.33 + 0.34) / 5)


def test_named_models_alone_and_in_this_order(results: Path) -> None:
    write(results / "other", "mmlu", 0.9)
    done = report("--results", results, "--base", "llama", "--model", "not-yet", "--markdown")
    assert cells(done.stdout)["task"] == ["metric", "llama", "not-yet", "difference"]
    assert cells(done.stdout)["MMLU, 5-shot"][1:] == ["32.0", "missing", "missing"]
    three = report("--results", results, "--base", "llama", "--model", RUN, "--model", "other", "--markdown")
    assert cells(three.stdout)["task"][-1] == "other"  # differences are of two


def test_a_reader_is_told_what_cannot_be_compared(results: Path) -> None:
    write(results / "llama", "winogrande", 0.5, date="2026-04-01T00-00-00.0", limit=100.0)
    write(results / "llama", "truthfulqa_mc2", 0.5, date="2026-04-01T00-00-00.0", shots=3)
    text = report("--results", results, "--markdown").stdout
    assert cells(text)["WinoGrande, 0-shot"][1] == "50.0 ± 1.0 *"
    assert "* not all questions were asked (--limit)." in text
    assert f"TruthfulQA: not comparable, llama: 3-shot, {RUN}: 0-shot." in text
    assert "± standard error" in text


def test_table_on_a_terminal_has_the_same_figures(results: Path) -> None:
    done = report("--results", results)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "ARC-challenge" in line]
    assert all(figure in line for figure in ("25-shot", "acc_norm", "30.0 ± 2.0", "40.0 ± 2.0", "+10.0"))
    assert "missing" in done.stdout and "mean of the five" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--results", "absent"], "--results absent: there is no such folder"),
        (["--results", "."], "--results .: holds no lm-eval results"),
        (["--results", "results", "--model", "x"], "has no result of x; it has llama"),
    ],
)
def test_nothing_to_show_is_a_sentence(
    words: list[str], said: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path if "results" in words else tmp_path / "empty")
    done = report(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ['{"results": ', "[]", '{"results": null}'])
def test_a_broken_file_is_named(content: str, results: Path) -> None:
    path = write(results / "llama", "mmlu", 0.1, date="2026-05-01T00-00-00.0")
    path.write_text(content)
    with pytest.raises(UserError, match=r"--input: .*mmlu_5shot_2026-05-01.* is no result file of lm-eval"):
        read_results(results)


def test_files_are_those_that_the_harness_writes(tmp_path: Path) -> None:
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path / "llama" / "winogrande_0shot.json"))
    tracker.save_results_aggregated(results=result_file("winogrande", 0.25))
    result = read_results(tmp_path)["llama"]["winogrande"]
    assert (result.score, result.stderr, result.metric, result.shots) == (0.25, 0.01, "acc", 0)


# --- all.sh -----------------------------------------------------------------------------------------------------------


def test_all_runs_what_is_missing_and_prints_the_table(
    recorder: tuple,
    results: Path,
    tmp_path: Path,
) -> None:
    env, calls = recorder
    merged = tmp_path / RUN / "merged"
    merged.mkdir(parents=True)
    (merged.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "llama"}')
    (results / "llama" / f"mmlu_5shot_{'2026-03-01T10-00-00.123456'}.json").write_text('{"results": {')  # cut short
    env |= {"MODEL": str(merged), "RESULTS": str(results)}
    done = call(ROOT / "scripts" / "eval" / "all.sh", "--limit", "10", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    *evaluated, table = calls()
    words = [" ".join(args) for args in evaluated]
    assert [f"pretrained={model}," in line for line, model in zip(words, ("llama", merged), strict=True)] == [True] * 2
    assert "--tasks mmlu" in words[0] and "--tasks hellaswag" in words[1]
    assert all("--limit 10" in line for line in words)
    assert table == [str(REPORT), "--results", str(results), "--base", "llama", "--model", RUN]
    assert done.stderr.count("there already") == 8


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        ({"training_summary.json": {"settings": {"model_name_or_path": "owner/base"}}}, "owner-base"),
        ({"../training_summary.json": {"settings": {"model_name_or_path": "owner/base"}}}, "owner-base"),
        ({"../adapter_config.json": {"base_model_name_or_path": "owner/base"}}, "owner-base"),
        ({}, None),
    ],
)
def test_base_is_what_the_run_was_trained_from(
    noted: dict,
    expected: str | None,
    recorder: tuple,
    tmp_path: Path,
) -> None:
    env, calls = recorder
    model = tmp_path / "run" / "merged"
    model.mkdir(parents=True)
    for name, content in noted.items():
        (model / name).write_text(json.dumps(content))
    env |= {"MODEL": str(model), "RESULTS": str(tmp_path / "results")}
    done = call(ROOT / "scripts" / "eval" / "all.sh", cwd=tmp_path, env=env)
    if expected is None:
        assert done.returncode == 2 and "says what it was trained from" in done.stderr and "BASE=" in done.stderr
        assert calls() == []
    else:
        assert done.returncode == 0, done.stderr
        assert calls()[-1][3:] == ["--base", expected, "--model", "run"]
        assert len(calls()) == 11
