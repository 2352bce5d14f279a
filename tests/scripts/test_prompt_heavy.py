"""The measurement of prompt-heavy tasks: its rows, runs that go on, the losses, and the time to a loss."""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "figures"))
sys.path.insert(
    0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench")
)  # in front: figures/ has this name too

import prompt_heavy
import prompt_tables
from prompts import comparison, tasks
from prompts.arms import ARMS, Arm
from prompts.comparison import compare, crossing
from prompts.evaluating import evaluate
from prompts.training import Run, rate_at, step_rows

from tokentune.errors import UserError

FIGURE = Path(__file__).resolve().parents[2] / "scripts" / "figures" / "prompt_heavy.py"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up rows in place of the real ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 24), ("validation", 6)):
        rows = [
            {"prompt": f"Tools: f(x), g(x)\nRequest: call f with {n}\nCall:", "completion": f" f({n})"}
            for n in range(count)
        ]
        (folder / f"tool_calls.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"instruction": "Say it.", "input": "", "output": "It."}
    (folder / "alpaca_en.validation.jsonl").write_text(5 * (json.dumps(row) + "\n"))
    return folder


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, data: Path, tmp_path: Path) -> Callable[..., dict]:
    """The command with few and short runs; returns its report."""
    output = tmp_path / "results" / "prompt_heavy.json"

    def run(*flags: str) -> dict:
        words = ["--model", tiny_llama_dir, "--data", data, "--output", output, "--tasks", "tools-lora", "--small"]
        monkeypatch.setattr(sys, "argv", ["prompt_heavy.py", *map(str, words), *flags])
        prompt_heavy.main()
        return json.loads(output.read_text())

    return run


# ------------------------------------------------------------------------------------------------------------ the runs


def test_runs_are_kept_and_not_repeated(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arms = ("--arms", "full-micro-batch", "answers", "--seeds", "0", "1")
    report = bench(*arms, "--minutes", "0")
    assert report["runs"] == [] and "full" in report["calibrations"][0]["seconds"]
    capsys.readouterr()
    bench(*arms, "--plan")
    plan = capsys.readouterr().out
    # Two rates at the shortest length, the longest at the chosen one; of seed 1 both lengths; one run as a check.
    assert "seed 0, full: 3 runs" in plan and "seed 1, answers: 2 runs" in plan
    assert "seed 0, full-micro-batch: 1 runs" in plan
    report = bench(*arms)
    assert len(report["runs"]) == 11 and len(report["calibrations"]) == 1
    rates = tasks.RATES["model", "lora"][:2]
    assert [(run["arm"], run["steps"], run["rate"]) for run in report["runs"][:4]] == [
        *(("full", 1, rate) for rate in rates),
        *(("answers", 2, rate) for rate in rates),
    ]
    for run in report["runs"]:
        assert run["seconds"] > 0 and len(run["validation"]["tokens"]) == len(run["held_out"]["tokens"]) == 4
        whole = run["tokens"]["processed"] == run["tokens"]["selected"]
        assert whole == (run["arm"] != "answers")
        assert whole or run["tokens"]["selected"] == run["tokens"]["supervised"]
    rows = {row["arm"]: row for row in report["comparison"]}
    assert [point["steps"] for point in rows["answers"]["points"]] == [2, 4]
    assert rows["full-micro-batch"]["points"][0]["losses"] == rows["full"]["points"][0]["losses"]
    assert abs(rows["full-micro-batch"]["difference_to_full"]) < 1e-3
    assert rows["full"]["to_full"]["ratio"] == 1 and rows["answers"]["seeds"] == [0, 1]

    def never(*_: object) -> None:
        raise AssertionError("is there already")

    monkeypatch.setattr(prompt_heavy, "train", never)
    monkeypatch.setattr(prompt_heavy, "calibrate", never)
    assert bench(*arms) == report


def test_an_arm_that_is_refused_is_left_out(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(ARMS, "answers", Arm({"tokentune": "", "prefix_length": "answers", "selection_pass": ""}))
    report = bench("--arms", "answers", "--seeds", "0")
    assert "selection_pass" in report["refused"]["tools-lora"]["answers"]
    assert "without answers" in capsys.readouterr().out
    assert {run["arm"] for run in report["runs"]} == {"full"}
    assert len(bench("--arms", "answers", "--seeds", "0")["calibrations"]) == 1


def test_a_task_needs_its_model(bench: Callable) -> None:
    with pytest.raises(SystemExit, match="need --tiny"):
        bench("--tasks", "tiny-tools-lora")


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 20) for step in range(20)]
    assert rates[:2] == [0.5, 1.0] and rates[1:] == sorted(rates[1:], reverse=True) and 0 < rates[-1] < 0.01
    assert rate_at(0, 1) == 1


def test_rows_come_in_the_same_order_for_all_and_anew_in_each_epoch() -> None:
    rows = [{"at": n, "input_ids": [0] * (n * 7 % 10)} for n in range(10)]
    place = prompt_heavy.Place(tasks.TASKS["tools-lora"].small(), Path(), Path(), None, {"train": rows})
    steps = step_rows(place, 3)
    first, second = ([next(steps) for _ in range(2)] for _ in range(2))
    again = step_rows(place, 3)
    assert [next(again) for _ in range(4)] == first + second
    seen = [[row["at"] for step in epoch for row in step] for epoch in (first, second)]
    assert all(len(set(rows)) == 8 for rows in seen) and seen[0] != seen[1]
    lengths = [sorted(len(row["input_ids"]) for row in step) for step in first]
    assert max(lengths[0]) < min(lengths[1]) or max(lengths[1]) < min(lengths[0])
    draws = {row["at"]: row["draw_seed"] for step in first for row in step}
    assert all(draws.get(row["at"]) != row["draw_seed"] for step in second for row in step)


# -------------------------------------------------------------------------------------------------------------- losses


def test_losses_are_the_models_and_exact_is_what_greedy_decoding_gives(tiny_llama_dir: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).train()
    rows = []
    for number, length in enumerate((5, 9, 3, 7)):
        prompt = torch.randint(3, 90, (length,))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model.eval()
            whole = model.generate(prompt[None], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0
            ]
        if number % 2:
            whole[length + 1] = (whole[length + 1] + 1) % 90
        labels = whole.clone()
        labels[:length] = -100
        rows.append({"input_ids": whole.tolist(), "labels": labels.tolist()})
    found = evaluate(model.train(), rows, 0, batch=3)
    assert found["exact"] == [1, 0, 1, 0] and found["tokens"] == [3] * 4 and model.training
    for row, loss in zip(rows, found["loss_sums"], strict=True):
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert loss == pytest.approx(3 * model(**batch).loss.item(), abs=0.02)


# ------------------------------------------------------------------------------------------------------ what they say


def test_crossing_is_linear_in_the_logarithm_of_the_steps() -> None:
    assert crossing([10, 40, 160], [3.0, 2.0, 1.0], 1.5) == pytest.approx(80)
    assert crossing([10, 40, 160], [3.0, 2.0, 1.0], 2.75) == pytest.approx(10 * 4**0.25)
    assert crossing([10, 40], [3.0, 2.0], 2.0) == 40
    assert crossing([10, 40], [3.0, 2.0], 3.5) == 10  # an upper bound
    assert crossing([10, 40], [3.0, 2.0], 1.9) == math.inf
    assert crossing([10, 40, 160], [3.0, 3.5, 1.5], 2.5) == pytest.approx(80)  # not better from one length to the next


def found(*losses: float) -> dict:
    """Two tokens in each row."""
    return {"loss_sums": [2 * loss for loss in losses], "tokens": [2] * len(losses), "exact": [0] * len(losses)}


def run(arm: str, steps: int, seed: int, *losses: float, rate: float = 0.1, held_out: float = 1.0) -> dict:
    return {"task": "tools-lora", "arm": arm, "steps": steps, "seed": seed, "rate": rate} | {
        "validation": found(*losses),
        "held_out": found(held_out),
        "other": found(2.0),
    }


@pytest.fixture
def report() -> dict:
    """Full training: 2.0 and 1.0 after 10 and 40 steps; `answers` 2.5, 1.5 and 0.5 after 20, 80 and 320, a quarter of
    the time each."""
    task = {"rates": [0.1, 0.2], "most_rates": 2, "lengths": [10, 40], "base": {"validation": found(3.0, 3.0)}}
    calibration = {
        "task": "tools-lora",
        "seconds": {"full": [4.0, 8.0, 4.0], "answers": [1.0, 2.0, 1.0], "full-chunked": [2.0, 4.0, 2.0]},
        "saved_bytes": {"full": 1000, "answers": 100, "full-chunked": 500},
    }
    calibration["cpu_seconds"] = calibration["seconds"]
    runs = [
        run("full", 10, 0, 2.0, 2.0),
        run("full", 10, 0, 0.1, 0.1, rate=0.2, held_out=1.1),
        run("full", 40, 0, 1.0, 1.0),
        run("answers", 20, 0, 2.5, 2.5),
        run("answers", 20, 0, 9.0, 9.0, rate=0.2, held_out=1.1),
        run("answers", 80, 0, 1.5, 1.5),
        run("answers", 320, 0, 0.5, 0.5),
        run("answers", 20, 1, 0.1, 0.1),  # a seed without the other lengths
    ]
    return {"tasks": {"tools-lora": task}, "calibrations": [calibration], "runs": runs}


def test_time_to_the_loss_of_full_training(report: dict) -> None:
    rows = {row["arm"]: row for row in compare(report)}
    own = rows["answers"]
    assert own["rate"] == 0.1 and own["seeds"] == [0] and own["ratio"] == 0.25 and own["bytes_ratio"] == 0.1
    assert own["to_full"]["steps"] == pytest.approx(160) and own["to_full"]["reached"] == 1
    for name in ("ratio", "low", "high"):  # all rows are alike, and all rounds
        assert own["to_full"][name] == pytest.approx(160 * 0.25 / 40)
    assert own["to_full"]["ratio_to_fastest"] == pytest.approx(2) and own["fastest_full"] == "full-chunked"
    goal = 3.0 - 0.98 * 2.0  # 1.04: between 80 and 320 steps, and between 10 and 40
    expected = 80 * 4 ** (1.5 - goal) * 0.25 / (10 * 4 ** (2.0 - goal))
    assert own["to_gain"]["ratio"] == pytest.approx(expected)
    assert rows["full"]["to_full"] == {
        "steps": 40,
        "ratio": 1,
        "low": 1,
        "high": 1,
        "reached": 1,
        "ratio_to_fastest": 2,
    }
    assert rows["full-chunked"]["to_full"]["ratio"] == 0.5 and rows["full-chunked"]["difference_to_full"] is None
    assert [point["seconds"] for point in own["points"]] == [20, 80, 320]


def test_an_arm_whose_runs_are_too_short(report: dict) -> None:
    report["runs"] = [run for run in report["runs"] if run["steps"] != 320]
    found = {row["arm"]: row for row in compare(report)}["answers"]["to_full"]
    assert found == {"steps": None, "ratio": None, "low": None, "high": None, "reached": 0, "ratio_to_fastest": None}
    assert prompt_tables.goal(found) == "not reached"


def test_nothing_is_said_before_rates_are_chosen(report: dict) -> None:
    report["runs"] = [run for run in report["runs"] if run["rate"] == 0.1]
    assert compare(report) == []


def test_rates_go_on_beyond_the_best_while_it_is_at_an_end(report: dict) -> None:
    def tried(*losses: float) -> list[float]:
        rates = (0.1, 0.2, 0.4, 0.8)
        pairs = zip(rates, losses, strict=False)
        report["runs"] = [run("full", 10, 0, 9.0, rate=rate, held_out=loss) for rate, loss in pairs]
        return comparison.rates_to_try(report, "tools-lora", "full")

    report["tasks"]["tools-lora"]["most_rates"] = 4
    assert tried(2.0) == [0.1, 0.2]  # not all of the first ones are known
    assert tried(2.0, 1.0) == [0.1, 0.2, 0.4] and tried(2.0, 1.0, 1.5) == [0.1, 0.2, 0.4]
    assert tried(1.0, 2.0) == [0.05, 0.1, 0.2]
    assert tried(4.0, 3.0, 2.0, 1.0) == [0.1, 0.2, 0.4, 0.8]  # no more than that
    assert comparison.chosen_rate(report, "tools-lora", "full") == 0.8


def test_intervals_are_those_of_the_rows_and_the_seeds(report: dict) -> None:
    """Two rows, 1.0 and 3.0: their mean is 1, 2 or 3 with probabilities 1/4, 1/2, 1/4."""
    full = {10: {seed: run("full", 10, seed, 1.0, 3.0) for seed in (0, 1)}}
    draws = comparison.Draws(found(3.0, 3.0), full)
    losses = draws.losses(found(1.0, 3.0))
    assert losses[0] == 2 and set(losses) == {1, 2, 3} and np.mean(losses == 2) == pytest.approx(0.5, abs=0.06)
    by_seed = {10: {0: run("full", 10, 0, 1.0, 1.0), 1: run("full", 10, 1, 2.0, 2.0)}}
    curve = draws.curve(by_seed, [0, 1])[10]
    assert curve[0] == 1.5 and set(curve) == {1, 1.5, 2} and np.mean(curve == 1.5) == pytest.approx(0.5, abs=0.06)
    assert set(draws.curve(by_seed, [0, 1])[10] - curve) == {0}  # the same draws for all arms
    time = {"step_seconds": 1.0, "ratios": [0.5, 0.5]}
    point = draws.summary(full, time)["points"][0]
    assert (point["low"], point["loss"], point["high"]) == (1, 2, 3)


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("hops", [1, 2])
def test_chains_lead_to_the_answer(hops: int) -> None:
    row = tasks.chain_row(random.Random(3), hops, 5)
    links, _, question = row["prompt"].partition(". ")
    following = dict(link.split(" > ") for link in links.split(", "))
    assert len(following) == 5 * hops
    letter = question.split()[1].rstrip(",")
    for _ in range(hops):
        letter = following[letter]
    assert row["completion"] == f" {letter}"
    assert tasks.lookup(Path(), hops=hops, rows=20)["train"] == tasks.lookup(Path(), hops=hops, rows=20)["train"]


def test_names_are_written_out() -> None:
    tags = ["O", "B-location", "I-location", "O", "B-person"]
    row = tasks.named({"tokens": ["in", "New", "York", "with", "Ann"], "ner_tags": tags})
    assert row == {"prompt": "Text: in New York with Ann\nNames:", "completion": " New York; Ann"}
    assert tasks.named({"tokens": ["none"], "ner_tags": ["O"]})["completion"] == " none"


def test_opinions_have_examples_in_front(tmp_path: Path) -> None:
    (tmp_path / "glue").mkdir()
    for split in tasks.SPLITS:
        lines = [json.dumps({"sentence": f"{split} {n}", "label": n % 2}) + "\n" for n in range(6)]
        (tmp_path / "glue" / f"sst2.{split}.jsonl").write_text("".join(lines))
    row = tasks.opinions(tmp_path, shots=2)["validation"][3]
    assert row["prompt"].count("train") == 2 and row["prompt"].endswith("Review: validation 3\nOpinion:")
    assert row["completion"] == " good"


# ----------------------------------------------------------------------------------------------------- figure and table


def figure():
    """scripts/figures/prompt_heavy.py, which has the name of the measurement."""
    found = importlib.util.spec_from_file_location("prompt_heavy_figure", FIGURE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_picture_and_table_are_made_from_a_part_of_the_results(report: dict, tmp_path: Path) -> None:
    report["comparison"] = compare(report)
    (tmp_path / "results.json").write_text(json.dumps(report))
    figure().draw(tmp_path / "results.json", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    header, rows = prompt_tables.time_to_loss(report)
    assert all(len(row) == len(header) for row in rows) and len(rows) == 3
    assert rows[1][:2] == ["tool calls, LoRA", "**TokenTune, answers**"] and "1.00 (1.00 to 1.00)" in rows[1]
    (tmp_path / "results.json").write_text('{"comparison": []}')
    with pytest.raises(UserError, match="holds no runs"):
        figure().draw(tmp_path / "results.json", tmp_path / "picture.png")


def test_every_arm_and_task_has_a_look_and_a_label() -> None:
    assert set(figure().LOOKS) == set(ARMS)
    assert len({prompt_tables.arm_label(arm) for arm in ARMS}) == len(ARMS)
    assert len({prompt_tables.task_label(task) for task in tasks.TASKS}) == len(tasks.TASKS)
    assert Run("tools-lora", "full", 1, 0, None).rate is None
