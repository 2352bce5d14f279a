"""The main experiment, with a stand-in for python. The whole small run is slow: REPRODUCE_RUN=1 turns it on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bash_scripts import call

from tokentune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "reproduce.sh"
CODE = ROOT / "scripts" / "reproduce"
sys.path.append(str(CODE))

RUNS = ["full", "tokentune", "lora", "lora_tokentune", "qlora", "qlora_tokentune"]
# Stands in for python: writes each call to $CALLS and does what the next step looks for: the run's folder by the flags,
# an adapter in it, a merged model. Fails where the call matches $FAIL_ON. The scripts' own look-ups (-c) are real.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, re, sys
args = sys.argv[1:]
if args[0] == "-c":
    os.execv(sys.executable, [sys.executable, *args])
command = " ".join(args)
def value(flag):
    return args[len(args) - 1 - args[::-1].index(flag) + 1]
if "finetune.py" in command:
    name = "model-data" + "".join(f"-{{f}}" for f in ("lora", "qlora") if f"--{{f}}" in args)
    name += f"-tokentune-{{value('--prefix_length')}}" if "--tokentune" in args else ""
    folder = pathlib.Path(value("--model_save_path")) / name
    if "--print_run_folder" in args:
        print(folder)
        sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.environ.get("MODEL"), *args]) + "\\n")
if re.search(os.environ.get("FAIL_ON", "(?!)"), command):
    sys.exit(3)
if "finetune.py" in command:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{{"base_model_name_or_path": "model"}}')
elif "merge.py" in command:
    pathlib.Path(value("--output_dir")).mkdir(exist_ok=True)
"""


@pytest.fixture
def stand_in(tmp_path):
    """(environment that makes the script run the stand-in, a function that reads its calls and forgets them)."""
    python, log = tmp_path / "python", tmp_path / "calls.jsonl"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = {"PYTHON": str(python), "CALLS": str(log), "REPRODUCE_DIR": str(tmp_path / "out")}

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return env, calls


def flags_of(args):
    """["--a", "1", "--b", "--a", "2"] -> {"--a": ["2"], "--b": []}: the last one counts."""
    flags = {}
    for word in args:
        if word.startswith("--"):
            flags[word] = values = []
        elif flags:
            values.append(word)
    return flags


def commands(calls):
    """What was run, without models and flags: "finetune.py", "lm_eval", ..."""
    return [next(Path(word).name for word in args[1:] if word.endswith(".py") or word == "lm_eval") for args in calls]


def test_everything_runs_once_in_order(stand_in, tmp_path):
    env, calls = stand_in
    done = call(SCRIPT, "--num_epochs", "2", cwd=tmp_path, env=env | {"PROPORTIONS": "0.1 0.5"})
    assert done.returncode == 0, done.stderr
    made = calls()
    adapters = ["finetune.py", "merge.py"]
    training = ["finetune.py"] * 2 + adapters * 4 + ["finetune.py"] * 2  # all weights; adapters; proportions
    figures = ["table.py", "evaluation.py", "loss_by_proportion.py", "memory_breakdown.py"]
    assert commands(made) == [*training, *["lm_eval"] * 35, "step.py", *figures]

    runs = [flags_of(args[2:]) for args, name in zip(made, commands(made), strict=True) if name == "finetune.py"]
    methods = [[flag for flag in ("--lora", "--qlora", "--tokentune") if flag in flags] for flags in runs[:6]]
    assert methods == [
        [],
        ["--tokentune"],
        ["--lora"],
        ["--lora", "--tokentune"],
        ["--lora", "--qlora"],
        ["--lora", "--qlora", "--tokentune"],
    ]
    for flags in runs:
        assert flags["--num_epochs"] == ["2"] and "--bf16" in flags and "--overwrite_output_dir" in flags
        assert flags["--model_name_or_path"] == ["meta-llama/Llama-2-7b-hf"]
        assert flags["--model_save_path"] == [str(tmp_path / "out" / "models")]

    assert [flags.get("--base_dtype") for flags in runs] == [["bfloat16"]] * 2 + [None] * 6

    evaluated = [(args[args.index("--tasks") + 1], args[0]) for args in made if "lm_eval" in args]
    models = tmp_path / "out" / "models"
    assert evaluated[:3] == [
        ("arc_challenge", "meta-llama/Llama-2-7b-hf"),
        ("arc_challenge", str(models / "model-data")),
        ("arc_challenge", str(models / "model-data-tokentune-0.3")),
    ]
    assert evaluated[-1] == ("winogrande", str(models / "model-data-lora-qlora-tokentune-0.3" / "merged"))
    assert len({task for task, _ in evaluated}) == 5 and len({model for _, model in evaluated}) == 7


def test_finished_stages_are_skipped_and_a_failed_one_is_done_again(stand_in, tmp_path):
    env, calls = stand_in
    env |= {"RUNS": "lora lora_tokentune", "PROPORTIONS": "", "TASKS": "arc"}
    failed = call(SCRIPT, cwd=tmp_path, env=env | {"FAIL_ON": "merge.py.*tokentune"})
    assert failed.returncode == 3
    assert commands(calls()) == ["finetune.py", "merge.py"] * 2
    markers = sorted(path.name for path in (tmp_path / "out" / ".done").iterdir())
    assert [name for name in markers if not name.startswith("folder-of")] == ["train-lora"]

    going_on = call(SCRIPT, cwd=tmp_path, env=env)
    assert going_on.returncode == 0, going_on.stderr
    figures = ["table.py", "evaluation.py", "loss_by_proportion.py", "memory_breakdown.py"]
    assert commands(calls()) == ["finetune.py", "merge.py", *["lm_eval"] * 3, "step.py", *figures]
    assert going_on.stderr.count("finished earlier, skipped") == 1

    again = call(SCRIPT, cwd=tmp_path, env=env)
    assert again.returncode == 0 and commands(calls()) == figures
    fresh = call(SCRIPT, "--fresh", cwd=tmp_path, env=env)
    assert fresh.returncode == 0 and commands(calls())[:4] == ["finetune.py", "merge.py"] * 2


@pytest.mark.parametrize("wrong", [{"RUNS": "lora dora"}, {"TASKS": "arc boolq"}])
def test_an_unknown_name_ends_with_a_sentence(wrong, stand_in, tmp_path):
    env, calls = stand_in
    done = call(SCRIPT, cwd=tmp_path, env=env | wrong)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "there are: " in done.stderr
    assert calls() == [] and not (tmp_path / "out").exists()


def test_small_run_without_its_data_says_so_and_does_nothing(stand_in, tmp_path):
    env, calls = stand_in
    done = call(SCRIPT, "--small", cwd=tmp_path, env=env | {"SHARED": str(tmp_path / "absent")})
    assert done.returncode == 0 and "nothing done" in done.stderr
    assert calls() == [] and not (tmp_path / "out").exists()


def test_small_run_takes_the_same_path(stand_in, tmp_path):
    env, calls = stand_in
    shared = tmp_path / "shared"
    (shared / "models" / "llama-tiny").mkdir(parents=True)
    (shared / "data").mkdir()
    (shared / "data" / "alpaca_en.train.jsonl").touch()
    done = call(SCRIPT, "--small", cwd=tmp_path, env=env | {"SHARED": str(shared), "RUNS": "qlora_tokentune"})
    assert done.returncode == 0, done.stderr
    made = calls()
    training = ["finetune.py", "merge.py", "finetune.py", "finetune.py"]  # of two more proportions the losses alone
    assert commands(made)[:7] == ["small_data.py", *training, *["lm_eval"] * 2]
    assert flags_of(made[1][2:])["--dataset_name_or_path"] == [str(tmp_path / "out" / "data" / "train.jsonl")]
    evaluation = made[5]
    assert evaluation[0] == str(shared / "models" / "llama-tiny")
    assert evaluation[evaluation.index("--tasks") + 1] == "reproduce_alpaca" and "arc_challenge" not in evaluation
    step = next(args for args in made if "step.py" in " ".join(args))
    assert step[-3:] == ["--small", "--device", "cpu"]


def test_help_is_the_head_of_the_script(tmp_path):
    done = call(SCRIPT, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "REPRODUCE_DIR" in done.stdout and "source" not in done.stdout


# -------------------------------------------------------------------------------------------------- its data and table


def test_questions_have_one_right_answer(alpaca_file, tmp_path):
    import random

    import small_data

    rows = small_data.read_rows(alpaca_file, 16)
    questions = small_data.make_questions(rows, random.Random(0))
    assert len(questions) == 16
    for row, question in zip(rows, questions, strict=True):
        assert question["prompt"].endswith("### Response:\n") and row["instruction"] in question["prompt"]
        assert question["choices"][question["answer"]] == row["output"]
        assert question["choices"].count(row["output"]) == 1 and len(question["choices"]) == 4
    assert questions == small_data.make_questions(rows, random.Random(0))
    with pytest.raises(UserError, match="16 rows, 17 are needed"):
        small_data.read_rows(alpaca_file, 17)


def test_lm_eval_loads_the_task(alpaca_file, tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    import small_data

    flags = ["--train", alpaca_file, "--validation", alpaca_file, "--output_dir", tmp_path / "data"]
    flags += ["--train_rows", 4, "--validation_rows", 4, "--questions", 12]
    monkeypatch.setattr(sys, "argv", ["small_data.py", *map(str, flags)])
    small_data.main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = tasks.TaskManager(include_path=str(CODE / "tasks"), include_defaults=False)
    task = manager.load(["reproduce_alpaca"])["tasks"]["reproduce_alpaca"]
    (first, *_) = documents = list(task.test_docs())
    assert len(documents) == 12
    assert task.doc_to_text(first) == first["prompt"] and task.doc_to_choice(first) == first["choices"]
    assert task.doc_to_target(first) == first["answer"]


def summary(peak, loss):
    losses = {"loss": {"first": 3.0, "last": loss}, "validation_loss": None}
    return {"peak_memory_bytes": peak, "saved_for_backward_bytes": 2**20, "tokens_per_second": 12.3} | losses


def test_table_compares_with_full_training_and_the_paper(tmp_path):
    import table

    figures = {"": (1000, 2.0), "-tokentune-0.3": (700, 2.1), "-lora-qlora-tokentune-0.3": (200, 2.2)}
    names = ["base"]
    for suffix, (peak, loss) in figures.items():
        names.append(f"base-data{suffix}")
        (tmp_path / "models" / names[-1]).mkdir(parents=True)
        (tmp_path / "models" / names[-1] / "training_summary.json").write_text(json.dumps(summary(peak, loss)))
    for at, name in enumerate(names):
        results = {"results": {"winogrande": {"acc,none": 0.5 + at / 10}}}
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "winogrande_2026-01-01T00-00-00.1.json").write_text(json.dumps(results))
    rows = {row["model"]: row for row in table.collect(tmp_path)}
    assert list(rows) == ["base", "all weights", "TokenTune, 0.3", "QLoRA + TokenTune, 0.3"]
    assert rows["TokenTune, 0.3"]["of_full"] == 0.7 and rows["TokenTune, 0.3"]["paper"] == 0.72
    assert rows["QLoRA + TokenTune, 0.3"]["scores"] == {"winogrande": pytest.approx(0.8)}
    text = table.as_markdown(list(rows.values()), [])
    assert "| TokenTune, 0.3 | 0.0 MiB | 70% | 72% | 1.0 MiB | 12 | 2.100 |  | 70.0% |" in text


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("REPRODUCE_RUN") != "1", reason="the whole small run: REPRODUCE_RUN=1 runs it")
def test_the_whole_small_run(shared, tmp_path):
    env = os.environ | {"REPRODUCE_DIR": str(tmp_path / "out"), "SHARED": str(shared), "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(SCRIPT), "--small"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["rows"]) == 9 and len(report["claims"]) == 3
    assert sum(bool(row["scores"]) for row in report["rows"]) == 7  # without the two that are there for their losses
    for picture in ("evaluation", "loss_by_proportion", "memory_breakdown"):
        assert (tmp_path / "out" / "figures" / f"{picture}.png").stat().st_size > 5000
