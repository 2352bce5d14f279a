"""The measurement of strategies: its list of runs, what it makes of their losses, the losses of its regularisers."""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "figures"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import quality_by_strategy
import quality_tables
import result_tables
import selection_quality
import selection_quality_encoders as encoders
from quality import comparison, experiments
from quality.answer_window import answer_window
from quality.experiments import Experiment, Workplace
from quality.regularisers import RDrop, Smoothed, Twice
from quality.running import Job, run_all
from quality.step_times import measure_steps

from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.sampling.strategies import Tokens
from tokentune.settings.classification import ClassificationArguments

PLACE = Workplace(Path("a-model"), Path("train.jsonl"), Path("validation.jsonl"), Path("folder"))
RATIOS = {
    (trained, base, share): share
    for trained in ("full", "lora")
    for base in ("full", experiments.EQUAL_BYTES)
    for share in (0.1, 0.3, 0.5)
}

# ---------------------------------------------------------------------------------------------------------- experiments


def test_every_experiment_is_listed_once_with_flags_of_the_command() -> None:
    listed = experiments.experiments()
    assert len(listed) == len(set(listed)) > 100
    for experiment in {Experiment(run.arm, run.trained, run.method, run.proportion, 1) for run in listed}:
        settings = experiment.settings(RATIOS)
        arguments = parse_arguments(experiments.words(PLACE, experiment, settings))
        selective = experiment.method not in experiments.BASELINES
        assert arguments.selection.tokentune == selective and arguments.optimization.seed == 1
        if selective:
            assert arguments.selection.selected == experiment.proportion


def test_what_is_compared_has_the_same_seeds() -> None:
    listed = experiments.experiments()
    for run in listed:
        if run.method not in experiments.BASELINES:
            assert Experiment(run.arm, run.trained, "random", run.proportion, run.seed) in listed


def test_runs_of_an_arm_differ_in_their_method_alone() -> None:
    own = {"tokentune", "prefix_length", "skip_verification", "gradient_checkpointing", "gradient_accumulation_steps"}
    own |= {"max_steps"} | {flag for method in experiments.METHODS.values() for flag in method.flags}
    for run in experiments.experiments():
        plain = Experiment(run.arm, run.trained, "full", None, run.seed).settings({})
        settings = run.settings(RATIOS)
        assert {flag: settings[flag] for flag in settings if flag not in own} == {
            flag: plain[flag] for flag in plain if flag not in own
        }


def test_baselines_keep_the_bytes_or_take_the_time() -> None:
    def baseline(method: str) -> Experiment:
        return Experiment("one epoch", "full", method, 0.3, 1)

    settings = baseline(experiments.EQUAL_BYTES).settings({})
    sequences = int(settings["global_batch_size"]) / int(settings["gradient_accumulation_steps"])
    assert sequences / int(settings["global_batch_size"]) <= 0.3
    assert baseline(experiments.EQUAL_TIME).settings({}) is None  # not before a step was measured
    rows = [("full", None, [4, 5, 9]), (experiments.EQUAL_BYTES, 0.3, [4, 4, 8]), ("random", 0.3, [2, 2.5, 6])]
    rows = [{"trained": "full", "method": name, "proportion": p, "seconds": seconds} for name, p, seconds in rows]
    ratios = selection_quality.time_ratios({"steps": {"rows": rows}})
    assert ratios == {("full", "full", 0.3): 0.5, ("full", experiments.EQUAL_BYTES, 0.3): 0.625}
    steps = experiments.ROWS // 16
    assert baseline(experiments.EQUAL_TIME).settings(ratios)["max_steps"] == str(steps // 2)
    both = baseline(experiments.EQUAL_BOTH).settings(ratios)
    assert both == settings | {"max_steps": str(round(steps * 0.625))}


@pytest.mark.parametrize(
    ("trained", "method", "units"),
    [
        ("full", "full", 6),
        ("full", "full, checkpointing", 8),
        ("full", "random", 2 + 4 * 0.3),
        ("full", "gradient", 2 + 6 * 0.3),
        ("full", "excess_loss", 4 + 6 * 0.3),
        ("lora", "full, equal time", 4),
        ("lora", "full, checkpointing", 6),
        ("lora", "supervised", 2 + 2 * 0.3),
        ("lora", "loss", 2 + 4 * 0.3),
    ],
)
def test_work_per_token(trained: str, method: str, units: float) -> None:
    assert experiments.units(Experiment("one epoch", trained, method, 0.3, 1)) == pytest.approx(units)


def test_the_reference_model_is_the_one_that_is_trained() -> None:
    experiment = Experiment("one epoch", "full", "excess_loss", 0.3, 1)
    settings = experiment.settings({})
    assert settings["selection_reference_model"] == experiments.MODEL  # results name no path
    words = experiments.words(PLACE, experiment, settings)
    assert words[words.index("--selection_reference_model") + 1] == "a-model"


def test_answer_window_is_a_window_in_the_answer() -> None:
    targets = torch.zeros(3, 20, dtype=torch.bool)
    targets[0, 8:18], targets[1, 12:15], targets[2, 5:7] = True, True, True
    seen = set()
    for _ in range(100):
        tokens = Tokens(torch.ones(3, 20).bool(), torch.rand(3, 20), torch.tensor([4, 5, 9]), targets=targets)
        chosen = answer_window(tokens)
        places = [row.nonzero().flatten().tolist() for row in chosen]
        assert all(row == list(range(row[0], row[-1] + 1)) for row in places)
        assert set(places[0]) <= set(range(8, 18))
        assert places[1:] == [list(range(10, 15)), list(range(9))]  # a shorter answer; no room in front of it
        seen.add(places[0][0])
    assert seen == set(range(8, 15))


# ------------------------------------------------------------------------------------------------------------- the runs


def stub(words: list[str]) -> None:
    """In place of finetune.py: a loss that the flags and the seed decide."""
    flags = dict(pairwise(words))
    if flags.get("--selection") == "broken":
        raise UserError("no such strategy")
    loss = 3.0 + 0.01 * int(flags["--seed"]) - (0.1 if flags.get("--selection") == "supervised" else 0.0)
    summary = {"validation_loss": {"base": 4.0, "final": loss}, "saved_for_backward_bytes": 1000, "versions": {}}
    summary |= {"optimizer_steps": 2, "tokens": {"processed": 10}, "loss": {"last": 1.0}}
    folder = Path(flags["--model_save_path"]) / "a-run"
    folder.mkdir(parents=True)
    (folder / "training_summary.json").write_text(json.dumps(summary))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    """The command with few runs and a stand-in for training; returns its report."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "alpaca_en.train.jsonl").write_text("{}\n" * 1000)
    output = tmp_path / "results" / "quality.json"
    runs = [
        Experiment("one epoch", "full", method, 0.3, seed) for seed in (1, 2) for method in ("random", "supervised")
    ]
    monkeypatch.setattr(selection_quality, "experiments", lambda: runs)
    monkeypatch.setattr(selection_quality.finetune, "main", stub)

    def run(*flags: str) -> dict:
        words = ["selection_quality.py", "--output", str(output), "--data", str(data), "--model", "a-model", *flags]
        monkeypatch.setattr(sys, "argv", words)
        selection_quality.main()
        return json.loads(output.read_text())

    return run


def test_runs_are_kept_and_not_repeated(bench: Callable, capfd: pytest.CaptureFixture) -> None:
    report = bench("--methods", "random")
    assert [(run["method"], run["seed"]) for run in report["runs"]] == [("random", 1), ("random", 2)]
    report = bench("--processes", "2")
    assert len(report["runs"]) == 4 and capfd.readouterr().out.count("==") == 4
    gap = next(row for row in report["comparison"] if row["method"] == "supervised")["to_random"]
    assert gap["mean"] == pytest.approx(-0.1) and gap["better"] and gap["seeds"] == 2
    assert bench() == report


def test_a_failing_strategy_leaves_the_others(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(experiments.METHODS, "supervised", experiments.Method({"selection": "broken"}))
    with pytest.raises(SystemExit, match="2 runs failed: supervised"):
        bench()
    report = json.loads((tmp_path / "results" / "quality.json").read_text())
    assert [run["method"] for run in report["runs"]] == ["random"] * 2
    assert "no such strategy" in capfd.readouterr().err


def test_runs_have_folders_of_their_own_that_are_deleted(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    found = []
    jobs = [Job(f"run {seed}", stub, ["--seed", str(seed)]) for seed in range(3)]
    failed = run_all(jobs, 3, tmp_path, lambda job, models: found.append((job.name, *models.glob("*/*.json"))))
    assert not failed and sorted(name for name, _ in found) == ["run 0", "run 1", "run 2"]
    assert len({path for _, path in found}) == 3 and not list(tmp_path.iterdir())


def test_steps_are_timed(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    place = Workplace(tiny_llama_dir, alpaca_file, alpaca_file, tmp_path)
    timed = (("full", None), ("random", 0.3))
    rows = measure_steps(place, 2, timed)["rows"]
    assert [(row["trained"], row["method"]) for row in rows] == [
        (trained, method) for trained in experiments.TRAINED for method, _ in timed
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert rows[0]["time_ratio_to_full"] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------ what they say


def loss_row(method: str, seed: int, loss: float, proportion: float | None = 0.3, arm: str = "one epoch") -> dict:
    own = {"arm": arm, "trained": "full", "method": method, "proportion": proportion, "seed": seed}
    return own | {
        "validation_loss": loss,
        "base_loss": 3.5,
        "saved_for_backward_bytes": 2**20 * (1 if proportion else 4),
    }


RUNS = [
    *(loss_row("full", seed, loss, None) for seed, loss in ((1, 3.0), (2, 3.1), (3, 3.2))),
    *(loss_row("random", seed, loss) for seed, loss in ((1, 3.1), (2, 3.3), (3, 3.2), (4, 9.9))),
    *(loss_row("supervised", seed, loss) for seed, loss in ((1, 3.08), (2, 3.26), (3, 3.17))),
    *(loss_row("random, correction 1", seed, loss) for seed, loss in ((1, 3.0), (2, 3.4), (3, 3.2))),
    loss_row("full, smaller micro-batch", 1, 3.001),
    loss_row("full, equal time", 1, 3.3),
]
STEPS = [{"trained": "full", "method": "supervised", "proportion": 0.3, "time_ratio_to_full": [0.4, 0.5, 0.6]}]


def test_differences_are_paired_by_seed() -> None:
    rows = {row["method"]: row for row in comparison.compare(RUNS, STEPS)}
    gap = rows["supervised"]["to_random"]
    gaps = [-0.02, -0.04, -0.03]  # seed 4 has no counterpart
    assert gap["mean"] == pytest.approx(-0.03) and gap["seeds"] == 3
    assert gap["standard_error"] == pytest.approx(torch.tensor(gaps).std().item() / math.sqrt(3), rel=1e-5)
    assert gap["better"] and not gap["worse"]
    to_full = rows["supervised"]["to_full"]  # 0.08, 0.16 and -0.03: no verdict
    assert to_full["mean"] == pytest.approx(0.07) and not to_full["worse"] and not to_full["better"]
    corrected = rows["random, correction 1"]
    assert corrected["to_uncorrected"] == corrected["to_random"] and not corrected["to_random"]["better"]
    assert rows["supervised"]["to_equal_time"] is None  # one seed has no error
    assert rows["full, smaller micro-batch"]["rounding"] == pytest.approx(0.001)
    assert rows["supervised"]["time_ratio_to_full"] == [0.4, 0.5, 0.6] and rows["random"]["time_ratio_to_full"] is None
    assert rows["supervised"]["bytes_ratio_to_full"] == 0.25
    assert rows["supervised"]["units_ratio_to_full"] == pytest.approx(3.2 / 6)


def test_scores_are_better_when_higher() -> None:
    own, other = {1: 0.8, 2: 0.9, 3: 0.85}, {1: 0.7, 2: 0.79, 3: 0.76}
    found = comparison.difference(own, other, higher_is_better=True)
    assert found["better"] and not found["worse"]
    assert comparison.difference(other, own, higher_is_better=True)["worse"]


def test_tables_and_picture_are_made_from_the_results(tmp_path: Path) -> None:
    report = {"runs": RUNS, "comparison": comparison.compare(RUNS, STEPS)}
    (tmp_path / "quality.json").write_text(json.dumps(report))
    quality_by_strategy.draw(tmp_path / "quality.json", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    table = result_tables.markdown(*quality_tables.strategies(report))
    assert (
        "| all weights | **supervised** | 3.170 ± 0.090 (3) | -0.0300 ± 0.0058 | better | 1 MiB | 0.53 | 0.50 |"
        in table
    )
    assert "no training | 3.500" in table
    assert "| random | 30% | 1 | 3.200 ± 0.200 (3) |" in result_tables.markdown(*quality_tables.corrections(report))
    more = [*RUNS, loss_row("supervised", 1, 3.0, 0.5)]
    rows = quality_tables.proportions({"runs": more, "comparison": comparison.compare(more, [])})[1]
    assert rows == [["all weights", "**supervised**", "3.170 ± 0.090 (3)", "3.000 (1)"]]


def test_table_of_rates_has_a_column_for_each_that_was_tried() -> None:
    runs = [*RUNS, loss_row("supervised", 1, 2.9, arm="half the rate")]
    header, rows = quality_tables.rates({"comparison": comparison.compare(runs, [])})
    assert header == ["tokens", "full training's best rate", "half of it"]
    assert rows == [["**supervised**", "3.170 ± 0.090 (3)", "2.900 (1)"]]


def test_a_picture_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="holds no runs"):
        quality_by_strategy.draw(tmp_path / "none.json", tmp_path / "none.png")


# ------------------------------------------------------------------------------------------------------------- encoders


def test_encoders_flags_are_those_of_the_command() -> None:
    options = Namespace(data=Path("data"), model="a-model", only=list(encoders.ENCODER_TASKS))
    options.methods = list(encoders.METHODS)
    jobs = encoders.missing({"runs": []}, options, Path("made"))
    assert len({job.name for job in jobs}) == len(jobs) > 15
    for job in jobs:
        arguments = parse_arguments(job.words, ClassificationArguments)
        assert arguments.selection.tokentune == encoders.METHODS[job.about[1]].selective


def test_runs_of_classification_are_taken_over(tmp_path: Path) -> None:
    settings = encoders.settings_of("paraphrase", "random")
    seeds = [{"seed": seed, "score": 0.8} for seed in (1, 2, 3)]
    run = {"task": "paraphrase", "method": "16", "settings": settings, "mean": 0.8, "standard_deviation": 0.0}
    other = run | {"settings": settings | {"weight_decay": "9"}}
    (tmp_path / "known.json").write_text(json.dumps({"runs": [other | {"seeds": seeds}, run | {"seeds": seeds[:2]}]}))
    report = {"runs": []}
    encoders.take_over(report, tmp_path / "known.json")
    assert report["runs"] == []
    (tmp_path / "known.json").write_text(json.dumps({"runs": [run | {"seeds": seeds}]}))
    encoders.take_over(report, tmp_path / "known.json")
    assert [(row["task"], row["method"]) for row in report["runs"]] == [("paraphrase", "random")]


def test_encoders_are_compared_by_seed() -> None:
    report = {"runs": []}
    for method, scores in (("random", (0.5, 0.6)), ("stratified", (0.6, 0.71))):
        seeds = [{"seed": at, "score": score} for at, score in enumerate(scores)]
        run = {"task": "sst2", "method": method, "settings": {}, "seeds": seeds, "mean": 0.6}
        encoders.add(report, run | {"standard_deviation": 0.01})
    gap = report["comparison"][1]["to_random"]
    assert gap["mean"] == pytest.approx(0.105) and gap["better"] and report["comparison"][1]["to_full"] is None
    (row,) = quality_tables.encoders(report)[1]
    assert row == ["SST-2, accuracy, 6 tokens", "", "60.0 ± 1.0", "", "60.0 ± 1.0 (better)", ""]


LABELS = torch.tensor([0, 2, 1])
LOGITS = torch.tensor([[1.0, 0.5, -1.0], [0.0, 2.0, 1.0], [0.3, 0.1, 0.2]])


def test_label_smoothing_is_pytorchs() -> None:
    outputs = SimpleNamespace(logits=LOGITS)
    whole = cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    assert Smoothed(0.1)(outputs, LABELS) == pytest.approx(whole.item())
    assert Smoothed(0.1)(outputs, LABELS, num_items_in_batch=6) == pytest.approx(whole.item() / 2)


def test_r_drop_is_cross_entropy_and_the_distance_of_two_passes() -> None:
    same, labels = torch.cat([LOGITS, LOGITS]), torch.cat([LABELS, LABELS])
    plain = cross_entropy(LOGITS, LABELS).item()
    assert RDrop(5.0)(SimpleNamespace(logits=same), labels) == pytest.approx(plain)
    other = LOGITS.flip(0)
    p, q = LOGITS.softmax(-1), other.softmax(-1)
    distance = ((p - q) * (p.log() - q.log())).sum() / 2  # of both directions, halved
    expected = (cross_entropy(LOGITS, LABELS) + cross_entropy(other, LABELS)) / 2 + 5.0 * distance / 6
    found = RDrop(5.0)(SimpleNamespace(logits=torch.cat([LOGITS, other])), labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_come_twice_with_one_selection() -> None:
    class Collator:
        def __call__(self, examples: list) -> dict[str, torch.Tensor]:
            return {"labels": torch.tensor(examples), "selected_positions": torch.rand(len(examples), 2)}

        def count(self, batch: dict) -> int:
            return len(batch["labels"])

    twice = Twice(Collator())
    batch = twice([3, 4])
    assert batch["labels"].tolist() == [3, 4, 3, 4] and twice.count(batch) == 4
    assert torch.equal(*batch["selected_positions"].chunk(2))
