"""What the tests of bash scripts share: a script called as a user calls it, and a stand-in for python that records.

`recorder` in conftest.py gives the stand-in to a test, and `replay` runs in this process what it recorded.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tokentune import classify, finetune, merge

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "scripts" / "train"

COMMANDS = {"classify.py": classify.main, "finetune.py": finetune.main, "merge.py": merge.main}
STEERING = {
    *("LAUNCH", "MODEL", "DATASET", "MODEL_SAVE_PATH", "RESULTS", "NUM_PROCESSES", "PYTHON"),
    *("VIRTUAL_ENV", "CONDA_PREFIX"),
}

# Stands in for python: writes each call to $CALLS, answers --print_run_folder with $RUN_FOLDER, and leaves an adapter
# there when finetune.py "trains", or exits with $FAIL where the call matches $FAIL_ON. The scripts' own look-ups (-c)
# are real.
RECORDER = f"""#!{sys.executable}
import json, os, pathlib, re, sys
args = sys.argv[1:]
if args[0] == "-c":
    os.execv(sys.executable, [sys.executable, *args])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(args) + "\\n")
if re.search(os.environ.get("FAIL_ON", "(?!)"), " ".join(args)):
    sys.exit(int(os.environ["FAIL"]))
if "--print_run_folder" in args:
    print(os.environ["RUN_FOLDER"])
elif args[1:2] and args[1].endswith("finetune.py"):
    folder = pathlib.Path(os.environ["RUN_FOLDER"])
    folder.mkdir(parents=True, exist_ok=True)
    base = args[len(args) - 1 - args[::-1].index("--model_name_or_path") + 1]
    (folder / "adapter_config.json").write_text(json.dumps({{"base_model_name_or_path": base}}))
"""


def call(script, *flags, cwd, env=None, timeout=600):
    """Runs a script with the caller's environment, less the variables that would steer it, plus `env`."""
    clean = {name: value for name, value in os.environ.items() if name not in STEERING}
    clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    command = ["bash", str(script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout)


def flags_of(args):
    """["--a", "1", "--b"] -> {"--a": ["1"], "--b": []}; a flag given twice is a failure."""
    flags, name = {}, None
    for word in args:
        if word.startswith("--"):
            assert word not in flags, f"{word} is passed twice"
            name, flags[word] = word, []
        elif name is not None:
            flags[name].append(word)
    return flags


def recording(folder: Path) -> tuple[dict[str, str], Callable[[], list[list[str]]]]:
    """Environment that makes the scripts run the recording stand-in, and a function that reads its calls."""
    python = folder / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    log = folder / "calls.jsonl"
    env = {"PYTHON": str(python), "CALLS": str(log), "RUN_FOLDER": str(folder / "models" / "the-run")}

    def calls():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return env, calls


def replay(calls: list[list[str]]) -> None:
    """Runs the commands among recorded calls with their words: imports alone take a process of its own 7 s."""
    for words in calls:
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        name = Path(words[at]).name
        if name in COMMANDS and "--print_run_folder" not in words:
            COMMANDS[name](words[at + 1 :])
