"""The bash scripts of scripts/glue, scripts/ner and scripts/vision, called as a user calls them; and their table.

What they pass to `classify.py` is checked with a stand-in for python that records its calls. One script's calls run for
real, offline, on a tiny BERT and a few rows.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bash_scripts import call, flags_of, replay
from conftest import tiny_bert_config
from transformers import BertForSequenceClassification, BertTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
SOME = ["rte", "cola"]  # where all of them would only take longer
BASE, LARGE = "google-bert/bert-base-uncased", "google-bert/bert-large-uncased"
GLUE_FLAGS = {
    "--model_save_path": [str(ROOT / "models")],
    "--dataset_name_or_path": ["nyu-mll/glue"],
    "--seeds": ["1", "2", "3"],
    "--global_batch_size": ["32"],
    "--num_epochs": ["3"],
    "--learning_rate": ["2e-5"],
    "--weight_decay": ["0.01"],
    "--warmup_steps": ["0.1"],
    "--lr_scheduler_type": ["linear"],
    "--max_length": ["128"],
}


def selecting(tokens):
    return {"--tokentune": [], "--prefix_length": [tokens]}


# Script -> (model, task, flags of the method) of every run that it makes.
GLUE_SCRIPTS = {
    "full_bert_base": [(BASE, task, {}) for task in TASKS],
    "full_bert_large": [(LARGE, task, {}) for task in SOME],
    "tokentune_bert_base": [(BASE, task, selecting("16")) for task in SOME],
    "tokentune_bert_large": [(LARGE, task, selecting("16")) for task in SOME],
    "mrpc_bert_base": [(BASE, "mrpc", flags) for flags in ({}, selecting("0.5"), selecting("0.25"))],
    "all": [(model, task, flags) for model in (BASE, LARGE) for flags in ({}, selecting("16")) for task in SOME],
}


def trainings(calls):
    """The calls that train; each was asked for its folder before."""
    *runs, table = calls
    assert table[:1] == [str(SCRIPTS / "glue" / "table.py")]
    naming, training = runs[::2], runs[1::2]
    assert naming == [[*words, "--print_run_folder"] for words in training]
    assert all(words[:2] == ["-u", str(ROOT / "tokentune" / "classify.py")] for words in training)
    return training


def test_the_scripts_are_these():
    assert sorted(path.stem for path in (SCRIPTS / "glue").glob("*.sh")) == sorted(GLUE_SCRIPTS)
    for folder in ("ner", "vision"):
        assert len(list((SCRIPTS / folder).glob("*.sh"))) == 1


@pytest.mark.parametrize("name", GLUE_SCRIPTS)
def test_glue_script_passes_its_settings(name, recorder, tmp_path):
    env, calls = recorder
    env |= {} if name in ("full_bert_base", "mrpc_bert_base") else {"TASKS": " ".join(SOME)}
    result = call(SCRIPTS / "glue" / f"{name}.sh", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    expected = [
        GLUE_FLAGS | {"--model_name_or_path": [model], "--task_name": [task]} | method
        for model, task, method in GLUE_SCRIPTS[name]
    ]
    assert [flags_of(words) for words in trainings(calls())] == expected
    assert calls()[-1][1:] == [str(ROOT / "models")]


def test_variables_and_extra_flags_override(recorder, tmp_path):
    env, calls = recorder
    env |= {"MODEL": "./my bert", "TASKS": "rte cola", "MODEL_SAVE_PATH": "out/runs"}
    env |= {"DATASET": "my rows/{task}.train.jsonl", "EVAL_DATASET": "my rows/{task}.validation.jsonl"}
    extra = ["--num_epochs", "5", "--bf16"]
    result = call(SCRIPTS / "glue" / "tokentune_bert_base.sh", *extra, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    rte, cola = trainings(calls())
    for words, task in ((rte, "rte"), (cola, "cola")):
        assert words[words.index("--model_name_or_path") + 1] == "./my bert"
        assert words[words.index("--dataset_name_or_path") + 1] == f"my rows/{task}.train.jsonl"
        assert words[words.index("--eval_dataset_name_or_path") + 1] == f"my rows/{task}.validation.jsonl"
        assert words[words.index("--model_save_path") + 1] == str(ROOT / "out" / "runs")
        assert words[-3:] == extra  # last, so that they win


def test_the_whole_table_ignores_a_model(recorder, tmp_path):
    env, calls = recorder
    result = call(SCRIPTS / "glue" / "all.sh", cwd=tmp_path, env=env | {"MODEL": "mine", "TASKS": "rte"})
    assert result.returncode == 0, result.stderr
    models = [words[words.index("--model_name_or_path") + 1] for words in trainings(calls())]
    assert models == [BASE, BASE, LARGE, LARGE]


def test_a_run_that_is_there_is_not_repeated(recorder, tmp_path):
    env, calls = recorder
    folder = Path(env["RUN_FOLDER"])
    folder.mkdir(parents=True)
    (folder / "classification_summary.json").write_text("{}")
    script = SCRIPTS / "glue" / "mrpc_bert_base.sh"
    result = call(script, cwd=tmp_path, env=env)
    assert result.returncode == 0 and "there already" in result.stderr
    assert len(calls()) == 3 + 1  # the three names, the table

    Path(env["CALLS"]).unlink()
    result = call(script, "--overwrite_output_dir", cwd=tmp_path, env=env)
    assert result.returncode == 0 and len(trainings(calls())) == 3


def test_stops_at_the_first_error(recorder, tmp_path):
    env, calls = recorder
    env |= {"FAIL_ON": "task_name sst2.*2e-5", "FAIL": "3"}
    result = call(SCRIPTS / "glue" / "full_bert_base.sh", cwd=tmp_path, env=env)
    assert result.returncode == 3
    assert len(calls()) == 3  # CoLA's two calls and SST-2's first


@pytest.mark.parametrize(
    "script", ["glue/full_bert_base", "glue/all", "ner/conll2003_bert_base", "vision/beans_vit_base"]
)
def test_passes_on_help(script, recorder, tmp_path):
    env, calls = recorder
    result = call(SCRIPTS / f"{script}.sh", "--help", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    ((*_, last),) = calls()
    assert last == "--help"


@pytest.mark.parametrize(
    ("script", "common", "methods"),
    [
        (
            "ner/conll2003_bert_base",
            {"--task_type": ["token"], "--dataset_name_or_path": ["lhoestq/conll2003"], "--max_length": ["256"]},
            [{}, selecting("0.3"), selecting("0.3") | {"--selection": ["labelled"]}],
        ),
        (
            "vision/beans_vit_base",
            {"--task_type": ["image"], "--dataset_name_or_path": ["AI-Lab-Makerere/beans"]},
            [{}, selecting("0.5")],
        ),
    ],
)
def test_token_and_image_scripts_compare_methods(script, common, methods, recorder, tmp_path):
    env, calls = recorder
    result = call(SCRIPTS / f"{script}.sh", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    found = [flags_of(words) for words in trainings(calls())]
    assert all(flags.items() >= (common | {"--seeds": ["1", "2", "3"]}).items() for flags in found)
    names = ("--tokentune", "--prefix_length", "--selection")
    assert [{name: flags[name] for name in names if name in flags} for flags in found] == methods

    Path(env["CALLS"]).unlink()
    env |= {"MODEL": "./mine", "DATASET": "train", "EVAL_DATASET": "validation"}
    assert call(SCRIPTS / f"{script}.sh", "--bf16", cwd=tmp_path, env=env).returncode == 0
    for words in trainings(calls()):
        flags = flags_of(words)
        assert flags["--model_name_or_path"] == ["./mine"] and words[-1] == "--bf16"
        assert flags["--dataset_name_or_path"] == ["train"] and flags["--eval_dataset_name_or_path"] == ["validation"]


# ----------------------------------------------------------------------------------------------------------- the table


def table(folder):
    command = [sys.executable, str(SCRIPTS / "glue" / "table.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_table_of_no_runs(tmp_path):
    result = table(tmp_path)
    assert result.returncode == 2 and "no run" in result.stderr and result.stdout == ""


def test_table_lists_every_run(tmp_path):
    runs = [("rte", "b-rte", 0.6, None, 5), ("mrpc", "b-mrpc", 0.87, 0.01, 8), ("mrpc", "a-mrpc", 0.9, 0.02, 2)]
    for task, name, score, deviation, saved in runs:
        times = (0.2,) if deviation is None else (0.1, 0.3)
        seeds = [{"saved_for_backward_bytes": saved * 2**20, "seconds_per_step": seconds} for seconds in times]
        summary = {"task": task, "metric": "f1", "mean": score, "standard_deviation": deviation, "seeds": seeds}
        (tmp_path / name).mkdir()
        (tmp_path / name / "classification_summary.json").write_text(json.dumps(summary))
    result = table(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[2:] == [
        "| mrpc | a-mrpc | f1 | 0.9000 ± 0.0200 | 2 | 2 MiB | 0.200 s |",
        "| mrpc | b-mrpc | f1 | 0.8700 ± 0.0100 | 2 | 8 MiB | 0.200 s |",
        "| rte | b-rte | f1 | 0.6000 | 1 | 5 MiB | 0.200 s |",
    ]


# ----------------------------------------------------------------------------------------------- for real, on stand-ins


def test_the_first_experiment_runs(recorder, tmp_path, monkeypatch):
    model, rows = tmp_path / "tiny-bert", tmp_path / "mrpc.jsonl"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(model / "vocab.txt"), model_max_length=128).save_pretrained(model)
    BertForSequenceClassification(tiny_bert_config(vocab_size=len(words), max_position_embeddings=128)).save_pretrained(
        model
    )
    pairs = [
        {"sentence1": "a b c d", "sentence2": "a b c d" if n % 2 else "e f g h", "label": n % 2} for n in range(12)
    ]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recorded, calls = recorder
    env = recorded | {"MODEL": f"./{model.name}", "MODEL_SAVE_PATH": str(tmp_path / "runs")}
    env |= {"DATASET": "{task}.jsonl", "EVAL_DATASET": "{task}.jsonl"}
    flags = ["--seeds", "1", "--num_epochs", "1", "--global_batch_size", "4", "--report_to", "none"]
    result = call(SCRIPTS / "glue" / "mrpc_bert_base.sh", *flags, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    replay(calls())
    result = table(tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| mrpc | ")]
    runs = ["tiny-bert-mrpc-mrpc", "tiny-bert-mrpc-mrpc-tokentune-0.25", "tiny-bert-mrpc-mrpc-tokentune-0.5"]
    assert [line[1] for line in lines] == runs
    saved = [
        json.loads((tmp_path / "runs" / run / "classification_summary.json").read_text())["seeds"][0]
        ["saved_for_backward_bytes"]
        for run in runs
    ]  # fmt: skip
    assert saved[0] > saved[2] > saved[1] > 0
