"""The command line of classify.py: what it shares with finetune.py's, encoders' defaults, what follows from flags."""

from dataclasses import fields
from pathlib import Path

import pytest

from tokentune.cli.answers import run_folder_of
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.data import DataArguments, RowsArguments
from tokentune.settings.run import WatchedRunArguments

REQUIRED = ["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data"]
# Where an encoder's default is not the one of finetune.py, and what finetune.py has not.
CHANGED = {
    "max_length": 128,
    "global_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "num_epochs": 3,
    "learning_rate": 2e-5,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "linear",
    "lora_target_modules": ["all-linear"],
    "save_total_limit": 1,
    "selection": "random",
    "dataset_split": None,
    "dataset_config": None,
}
ADDED = {
    "from_scratch": False,
    "test_dataset_name_or_path": None,
    "test_dataset_split": None,
    "test_dataset_config": None,
    "group_by_length": False,
    "max_train_rows": None,
    "seeds": [],
    "task_type": "text",
    "task_name": None,
    "text_columns": [],
    "label_column": None,
    "metric_for_best_model": None,
}


def parsed(words: str) -> ClassificationArguments:
    return parse_arguments([*REQUIRED, *words.split()], ClassificationArguments)


def test_flags_are_finetunes_and_a_few_more() -> None:
    finetune = parse_arguments(REQUIRED)
    causal_alone = {f.name for f in fields(DataArguments)} - {f.name for f in fields(RowsArguments)}
    causal_alone |= {f.name for f in fields(finetune.run)} - {f.name for f in fields(WatchedRunArguments)}
    shared = {name: value for name, value in finetune.settings().items() if name not in causal_alone}
    assert parsed("").settings() == shared | {"dataset_name_or_path": "owner/data"} | CHANGED | ADDED


def test_what_does_not_go_with_an_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokentune.settings.model.ModelArguments.__post_init__", lambda self: None)
    with pytest.raises(UserError, match="Liger has kernels for causal language models"):
        parsed("--use_liger_kernel")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--selection loss", "--selection loss is for causal language models (finetune.py): it needs the loss of each"),
        ("--selection tokenseek", "it needs the attention and gradient of each token"),
        ("--selection_pass", "--selection_pass is for causal language models"),
        ("--selection_draw top", "--selection_draw is for causal language models"),
        ("--selection_layers 2", "--selection_layers is for causal language models"),
        ("--selection excess_loss --selection_reference_model x", "--selection_reference_model is for causal"),
        ("--gradient_correction 1", "--gradient_correction is for causal language models"),
        ("--diagnose_steps 5", "--diagnose_steps is for causal language models"),
        ("--prefix_length 0.1:0.5", "--prefix_length 0.1:0.5: a size that changes over the run is for causal"),
        ("--selection supervised", "--selection supervised needs a label for each word"),
        ("--selection labeled", "Did you mean labelled?"),
    ],
)
def test_what_takes_a_causal_model_or_labels_of_words(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(f"--tokentune {words}")
    assert message in str(caught.value)


def test_one_seed_or_several() -> None:
    assert parsed("").seeds == [42] and parsed("--seed 7").seeds == [7]
    assert parsed("--seeds 1 2 3").seeds == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "owner-model-owner-data-text"),
        ("--task_name rte --tokentune --prefix_length 32", "owner-model-owner-data-rte-tokentune-32"),
        ("--task_type token --lora", "owner-model-owner-data-token-lora"),
        ("--task_type image --tokentune --prefix_length 0.5", "owner-model-owner-data-image-tokentune-0.5"),
        (
            "--task_type token --tokentune --prefix_length 0.3 --selection labelled",
            "owner-model-owner-data-token-tokentune-0.3-labelled",
        ),
        ("--tokentune --prefix_length 4 --selection stratified", "owner-model-owner-data-text-tokentune-4"),
        ("--tokentune --run_name second-try_2.1", "second-try_2.1"),
    ],
)
def test_run_folder_is_named_after_data_task_and_method(words: str, name: str) -> None:
    assert run_folder_of(parsed(f"--model_save_path runs {words}")) == Path("runs") / name


def test_a_glue_task_needs_no_data_set() -> None:
    words = ["--model_name_or_path", "owner/model", "--task_name", "mrpc"]
    arguments = parse_arguments(words, ClassificationArguments)
    assert run_folder_of(arguments).name == "owner-model-nyu-mll-glue-mrpc"
    assert arguments.task.glue.metric == "f1"


def test_help_lists_every_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help", "all"], ClassificationArguments)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: classify.py")
    assert all(f"--{name}" in text for name in (*CHANGED, *ADDED))
