"""What the classification measurements rest on: the made data, the list of experiments, the picture and the table."""

import json
import random
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert_config
from transformers import BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "figures"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import classification
import classification_steps
import paraphrases
import result_tables
import score_by_selection
from digits import write_digits, write_vit

from tokentune.errors import UserError

# ----------------------------------------------------------------------------------------------------- paraphrase pairs


@pytest.mark.parametrize(
    ("edit", "sentence", "edited"),
    [
        (paraphrases.synonym, "The child sat.", "The kid sat."),
        (paraphrases.drop_filler, "It was very late.", "It was late."),
        (paraphrases.contraction, "They do not agree.", "They don't agree."),
        (paraphrases.contraction, "They don't agree.", "They do not agree."),
        (paraphrases.exchange_joined, "We saw cats and dogs there.", "We saw dogs and cats there."),
        (paraphrases.front_phrase, "The old man left us in May.", "In May, the old man left us."),
        (paraphrases.negation, "He is here.", "He is not here."),
        (paraphrases.negation, "He isn't here.", "He is here."),
        (paraphrases.negation, "He never came.", "He came."),
        (paraphrases.opposite, "A good day.", "A bad day."),
        (paraphrases.exchange_names, "Then John saw Mary.", "Then Mary saw John."),
    ],
)
def test_edits(edit, sentence, edited):
    assert edit(sentence.split(), random.Random(0)) == edited.split()


@pytest.mark.parametrize(
    "edit", [paraphrases.synonym, paraphrases.drop_filler, paraphrases.other_number, paraphrases.exchange_names]
)
def test_edits_say_where_they_do_not_apply(edit):
    assert edit(["Nothing", "fits", "here", "."], random.Random(0)) is None


def test_another_number_is_another_one():
    for seed in range(20):
        words = paraphrases.other_number(["It", "took", "25", "days."], random.Random(seed))
        assert words[2].isdigit() and len(words[2]) == 2 and words[2] != "25"


def test_pairs_are_balanced_seeded_and_from_their_split(shared):
    glue = shared / "data" / "glue"
    pairs = paraphrases.paraphrases(glue, "validation", 40, seed=0)
    assert Counter(pair["label"] for pair in pairs) == {0: 20, 1: 20}
    assert pairs == paraphrases.paraphrases(glue, "validation", 40, seed=0)
    assert pairs != paraphrases.paraphrases(glue, "validation", 40, seed=1)
    assert all(pair["sentence1"].lower() != pair["sentence2"].lower() for pair in pairs)
    known = {text for task in paraphrases.SHARES for text in paraphrases.read_sentences(glue, task, "validation")}
    assert all({pair["sentence1"], pair["sentence2"]} & known for pair in pairs)


# --------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_an_image_folder(tmp_path):
    from PIL import Image

    write_digits(tmp_path)
    write_vit(tmp_path / "tiny-vit")
    counts = {split: len(list((tmp_path / split).glob("?/*.png"))) for split in ("train", "validation")}
    assert counts == {"train": 1438, "validation": 359}
    image = Image.open(tmp_path / "train" / "0" / "0000.png")
    assert image.size == (8, 8) and image.mode == "RGB" and image.getextrema()[0][1] > 200
    assert json.loads((tmp_path / "tiny-vit" / "config.json").read_text())["image_size"] == 8


# ---------------------------------------------------------------------------------------------------------- experiments


def summary_of(words: list[str], save_path: Path) -> dict:
    """In place of a training: a score that depends on what is selected, and all that a run's summary has."""
    score = 0.5 + 0.01 * len(words)
    facts = {"metrics": {}, "train_rows": 9, "steps": 3, "share_of_labels_trained": 1.0, "folder": str(save_path)}
    facts |= {"saved_for_backward_bytes": 1000, "seconds_per_step": 1.0, "tokens": {"processed": 10, "selected": 8}}
    seeds = [{"seed": seed, "score": score + 0.01 * seed} | facts for seed in (1, 2, 3)]
    return {"metric": "accuracy", "seeds": seeds, "mean": score + 0.02, "standard_deviation": 0.01}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the measurement with stand-ins for training and data; returns (report, experiments that were run)."""
    output, done = tmp_path / "results" / "classification.json", []

    def run(*flags, fail_at=None):
        done.clear()

        def trained(words, save_path):
            if len(done) == fail_at:
                raise KeyboardInterrupt
            done.append(words)
            return summary_of(words, save_path)

        monkeypatch.setattr(classification, "run_command", trained)
        monkeypatch.setattr(classification, "make_data", lambda options, folder: folder)
        words = ["classification.py", "--output", str(output), "--data", "somewhere", "--model", "a-model", *flags]
        monkeypatch.setattr(sys, "argv", words)
        classification.main()
        return json.loads(output.read_text()), list(done)

    run.output = output
    return run


def test_every_experiment_is_run_once(bench):
    report, done = bench()
    experiments = [(name, method) for name, task in classification.TASKS.items() for method in task.methods]
    assert [(run["task"], run["method"]) for run in report["runs"]] == experiments and len(done) == len(experiments)
    assert bench() == (report, [])  # nothing is left to do


def test_an_interrupted_measurement_goes_on_where_it_was(bench):
    with pytest.raises(KeyboardInterrupt):
        bench("--only", "rte", fail_at=2)
    first = json.loads(bench.output.read_text())
    assert len(first["runs"]) == 2
    report, done = bench("--only", "rte")
    assert report["runs"][:2] == first["runs"] and len(done) == len(classification.TASKS["rte"].methods) - 2


def test_other_settings_are_measured_again(bench, monkeypatch):
    bench("--only", "rte", "--methods", "full")
    monkeypatch.setitem(classification.COMMON, "weight_decay", "0.1")
    report, done = bench("--only", "rte", "--methods", "full")
    assert len(done) == len(report["runs"]) == 1 and report["runs"][0]["settings"]["weight_decay"] == "0.1"


def test_methods_of_a_task_differ_in_the_selection_alone(bench):
    report, done = bench()
    for task in classification.TASKS:
        settings = [run["settings"] for run in report["runs"] if run["task"] == task]
        for one in settings:
            assert {k: v for k, v in one.items() if k not in ("tokentune", "prefix_length", "selection")} == settings[0]
    assert all(words[words.index("--seeds") + 1 :][:2] == ["1", "2"] for words in done)


def test_the_flags_are_those_of_the_command():
    from tokentune.cli.arguments import parse_arguments
    from tokentune.settings.classification import ClassificationArguments

    options = Namespace(data=Path("data"), model="a-model", only=list(classification.TASKS))
    options.methods = list(classification.METHODS)
    for name, _, settings in classification.missing({"runs": []}, options):
        words = classification.command(options, name, Path("made"), settings)
        arguments = parse_arguments(words, ClassificationArguments)
        assert len(arguments.seeds) >= 2
        assert arguments.selection.tokentune == ("prefix_length" in settings)


def test_runs_that_are_compared_have_folders_of_their_own():
    from tokentune.cli.answers import run_folder_of
    from tokentune.cli.arguments import parse_arguments
    from tokentune.settings.classification import ClassificationArguments

    words = ["--model_name_or_path", "m", "--dataset_name_or_path", "rows.jsonl", "--task_type", "token"]
    methods = [method for name, method in classification.METHODS.items() if name != "full"]
    flags = [[word for pair in method.items() for word in (f"--{pair[0]}", *pair[1].split())] for method in methods]
    folders = {run_folder_of(parse_arguments([*words, *more], ClassificationArguments)) for more in ([], *flags)}
    assert len(folders) == 1 + len(methods)


def test_batches_of_about_one_length():
    """`--group_by_length`, which keeps padding out of the measurements."""
    from tokentune.cli.arguments import parse_arguments
    from tokentune.settings.classification import ClassificationArguments
    from tokentune.training.classification import classification_settings

    words = ["--model_name_or_path", "m", "--dataset_name_or_path", "rows.jsonl"]
    for flags, strategy in (([], "random"), (["--group_by_length"], "group_by_length")):
        arguments = parse_arguments([*words, *flags], ClassificationArguments)
        assert classification_settings(arguments, Path("run"), "loss").train_sampling_strategy == strategy
    with pytest.raises(UserError, match="--group_by_length"):
        parse_arguments([*words, "--task_type", "image", "--group_by_length"], ClassificationArguments)


def test_no_path_of_this_machine_is_kept(bench):
    report, _ = bench()
    assert all(word not in json.dumps(report) for word in ("somewhere", "a-model", "/models", "seconds_per_step"))


def test_steps_compare_bytes_and_seconds(tmp_path, monkeypatch):
    BertForSequenceClassification(tiny_bert_config(vocab_size=1100, max_position_embeddings=128)).save_pretrained(
        tmp_path
    )
    monkeypatch.setattr(classification_steps, "BATCH", 2)
    report = classification_steps.measure_steps(str(tmp_path), rounds=3)
    full, sixteen, thirty_two = report["rows"]
    assert full["bytes_ratio_to_full"] == 1 and full["time_ratio_to_full"] == 1
    assert 0 < sixteen["bytes_ratio_to_full"] < thirty_two["bytes_ratio_to_full"] < 0.5
    assert all(len(row["seconds"]) == 3 for row in report["rows"])


def test_steps_select_the_pooled_token():
    positions = classification_steps.pooled_and_others(torch.zeros(3, 20, dtype=torch.int64), 5)
    assert positions.shape == (3, 5) and bool((positions[:, 0] == 0).all())


# ---------------------------------------------------------------------------------------------------- picture and table


def test_picture_is_drawn_from_the_results(bench, tmp_path):
    report, _ = bench()
    score_by_selection.draw(bench.output, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    some = {"runs": [run for run in report["runs"] if run["task"] in ("rte", "digits")]}
    (tmp_path / "some.json").write_text(json.dumps(some))
    score_by_selection.draw(tmp_path / "some.json", tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size < (tmp_path / "picture.png").stat().st_size
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="holds no runs"):
        score_by_selection.draw(tmp_path / "none.json", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_table_is_made_from_the_results(bench, monkeypatch):
    report, _ = bench()
    costs = [("full", 4 * 2**20, 1.0), ("16", 2**20, 0.4), ("32", 2 * 2**20, 0.5)]
    rows = [
        {"method": method, "saved_for_backward_bytes": saved, "bytes_ratio_to_full": saved / 2**22, "seconds": [time],
         "time_ratio_to_full": time} for method, saved, time in costs
    ]  # fmt: skip
    report["steps"] = {"batch": 32, "length": 128, "rows": rows}
    monkeypatch.setattr(result_tables, "read", lambda name: report)
    texts, others = result_tables.classification_table().split("\n\n")
    full = next(run for run in report["runs"] if (run["task"], run["method"]) == ("rte", "full"))
    line = next(line for line in texts.splitlines() if line.startswith("| RTE"))
    assert line.split(" | ")[1] == f"{100 * full['mean']:.1f} ± 1.0"
    assert "2 MiB (0.50)" in texts and "0.40 s (0.40)" in texts
    assert others.splitlines()[-1].startswith("| digits, accuracy | ")
