"""What a run of classify.py counts: labels seen and learnt from, and epochs, also where it ends within an epoch."""

import json
from pathlib import Path

import pytest
from classification_models import save_tiny_bert, write_texts, write_words

from tokentune.classify import main

ROWS = 44  # of 8 in a batch: the last of an epoch's six is half as large
SHORT = "--global_batch_size 8 --max_length 32 --report_to none --logging_steps 1 --warmup_steps 0"
SELECTIVE = "--tokentune --prefix_length 4"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, and data of each type of task."""
    folder = tmp_path_factory.mktemp("summaries")
    return {
        "model": save_tiny_bert(folder / "bert"),
        "text": write_texts(folder / "texts.jsonl", ROWS, seed=0),
        "token": write_words(folder / "words.jsonl", ROWS, seed=0),
    }


@pytest.fixture
def summary(places: dict[str, Path], tmp_path: Path):
    """Runs the command and returns training_summary.json's content."""

    def run(task_type: str, words: str) -> dict:
        data = str(places[task_type])
        argv = ["--model_name_or_path", str(places["model"]), "--dataset_name_or_path", data, "--task_type", task_type]
        argv += ["--eval_dataset_name_or_path", data, "--model_save_path", str(tmp_path), "--overwrite_output_dir"]
        main([*argv, *SHORT.split(), *words.split()])
        (folder,) = tmp_path.glob("*-tokentune-*") if "--tokentune" in words else tmp_path.glob(f"*-{task_type}")
        return json.loads((folder / "training_summary.json").read_text())

    return run


@pytest.mark.parametrize("steps", [4, 6, 8])  # within the first epoch, at its end, within the second
def test_labels_of_words_are_those_of_the_steps_made(summary, steps: int) -> None:
    every = summary("token", f"--max_steps {steps}")["tokens"]
    assert every["labels"] == every["selected_labels"]
    some = summary("token", f"--max_steps {steps} {SELECTIVE}")
    assert some["tokens"]["labels"] == every["labels"]  # of the same rows: their order does not depend on the selection
    share = some["tokens"]["selected_labels"] / every["labels"]
    assert some["share_of_labels_trained"] == share and 0.2 < share < 0.8


def test_labels_of_texts_are_the_rows_of_the_steps_made(summary) -> None:
    ended = summary("text", f"--max_steps 8 {SELECTIVE}")
    assert ended["tokens"]["labels"] == ROWS + 2 * 8
    assert ended["share_of_labels_trained"] == 1.0


def test_labels_of_grouped_rows_are_those_of_the_steps_made(summary) -> None:
    every = summary("token", "--max_steps 4 --group_by_length")["tokens"]["labels"]
    ended = summary("token", f"--max_steps 4 --group_by_length {SELECTIVE}")["tokens"]
    assert ended["labels"] == every  # a number of tokens costs what the length says
    assert 0.2 < ended["selected_labels"] / every < 0.8


@pytest.mark.parametrize("length", ["--max_steps 8", "--num_epochs 2"])
def test_epochs_of_evaluations_are_those_of_the_data(summary, length: str) -> None:
    evaluations = summary("text", f"{length} --eval_steps 3")["evaluations"]
    expected = {"--max_steps 8": [3, 6, 8], "--num_epochs 2": [3, 6, 9, 12]}[length]
    assert [entry["step"] for entry in evaluations] == expected
    assert [entry["epoch"] for entry in evaluations] == pytest.approx([step / 6 for step in expected])
