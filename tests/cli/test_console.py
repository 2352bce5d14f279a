"""The console command, and what `--help` and `--version` import: nothing heavy."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import tokentune
from tokentune.cli import main as console
from tokentune.cli.start import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("accelerate", "datasets", "numpy", "peft", "torch", "transformers")
LOADED = """
import runpy, sys
path, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(path, run_name="__main__")
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules} & set(HEAVY)), file=sys.stderr)
"""


def loaded(*words: object) -> tuple[subprocess.CompletedProcess, str]:
    """A file run as a program in a process of its own, and the heavy packages that it imported."""
    command = [sys.executable, "-c", f"HEAVY = {HEAVY}\n{LOADED}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, re.search(r"loaded:(.*)", done.stderr)[1].strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_version_import_nothing_heavy(name: str) -> None:
    for word, said in (("--help", f"usage: {name}.py"), ("--version", f"tokentune {tokentune.__version__}")):
        done, heavy = loaded(ROOT / "tokentune" / f"{name}.py", word)
        assert (done.returncode, heavy) == (0, "") and done.stdout.startswith(said)


def test_a_misspelt_flag_is_found_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    done, heavy = loaded(ROOT / "tokentune" / "finetune.py", "--learnin_rate", "1")
    assert (done.returncode, heavy) == (2, "")
    assert done.stderr.startswith("error: unknown argument --learnin_rate: did you mean --learning_rate?\n")
    (tmp_path / "run.yaml").write_text("learnin_rate: 1\n")
    done, heavy = loaded(ROOT / "tokentune" / "finetune.py", "--config", tmp_path / "run.yaml")
    assert (done.returncode, heavy) == (2, "")
    assert "'learnin_rate' is no flag of this command; did you mean --learning_rate?\n" in done.stderr


@pytest.mark.parametrize("wrong", ["--optim adamw", "--report_to wandbb", "--lr_scheduler_type cosin", "--lora_r 0"])
def test_a_wrong_value_is_found_before_anything_heavy_is_imported(wrong: str) -> None:
    words = ["--model_name_or_path", "m", "--dataset_name_or_path", "d", "--selection", "loss", *wrong.split()]
    done, heavy = loaded(ROOT / "tokentune" / "finetune.py", *words)
    assert (done.returncode, heavy) == (2, "") and done.stderr.startswith(f"error: {wrong}")


def test_the_public_names_come_when_they_are_used() -> None:
    code = "import sys, tokentune; print('torch' in sys.modules, tokentune.apply_tokentune.__module__, *dir(tokentune))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, home, *names = done.stdout.split()
    assert (first, home) == ("False", "tokentune.api") and set(tokentune.__all__) <= set(names)
    with pytest.raises(AttributeError, match="module 'tokentune' has no attribute 'apply'"):
        _ = tokentune.apply


def test_all_commands_have_a_line_in_the_help(capsys: pytest.CaptureFixture) -> None:
    console.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    console.main(["--version"])
    assert capsys.readouterr().out == f"tokentune {tokentune.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetun"], "there is no command 'finetun': did you mean finetune?"),
        (["zzz"], "there is no command 'zzz': give one of finetune, classify, merge, chat, estimate, diagnose"),
        ([], "a command is missing: give one of finetune, classify, merge, chat, estimate, diagnose"),
    ],
)
def test_a_command_that_there_is_not(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        console.main(words)
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_packages_that_are_not_installed_are_named(name: str) -> None:
    """`-S`: without site-packages."""
    needed = {"merge": "--base_model_name_or_path b --peft_model_path a --output_dir o", "chat": "folder question"}
    words = needed.get(name, "--model_name_or_path m --dataset_name_or_path d").split()
    words = words[:2] if name == "estimate" else words
    for start in ([ROOT / "tokentune" / f"{name}.py"], ["-m", "tokentune", name]):
        command = [sys.executable, "-S", *map(str, start), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert re.fullmatch(r"error: \S+ lacks torch, transformers, .*: pip install '\.\[train\]'\n", done.stderr)


KEPT = """
import os, psutil, tokentune.cli.start
tokentune.cli.start.set_up_packages("finetune")
import torch
weight, resident = torch.ones(64, 64, dtype=torch.bfloat16), []
for last in (300, 1300):
    for rows in range(len(resident) * 300 + 1, last):
        torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
    resident.append(psutil.Process().memory_info().rss >> 20)
print(resident[1] - resident[0])
"""


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    """Of 16-bit products on a CPU; 1,000 more shapes take 590 MiB where all are kept."""
    done = subprocess.run([sys.executable, "-c", KEPT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250


@pytest.mark.slow
def test_an_installed_wheel_has_all_files_and_the_command(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith("tokentune/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {path.relative_to(source).as_posix() for path in (source / "tokentune").rglob("*") if path.is_file()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tokentune/")}
    assert {name for name in files if "/build/" not in name and "__pycache__" not in name} == packed
    assert {"tokentune/py.typed", "tokentune/alpaca_template.json"} <= packed

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # PyYAML alone of what is declared: nothing else is needed to list the flags.
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "yaml").symlink_to(Path(yaml.__file__).parent)
    for words, said in (
        (["--help"], "usage: tokentune COMMAND"),
        (["merge", "--help"], "usage: tokentune merge --base"),
    ):
        command = [tmp_path / "venv" / "bin" / "tokentune", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(said)
    module = subprocess.run([python, "-m", "tokentune", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == f"tokentune {tokentune.__version__}\n"
