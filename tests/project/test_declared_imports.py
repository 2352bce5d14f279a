"""What the code imports is declared in pyproject.toml and pinned, and asked for; where it does not run, it says so."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from tokentune.cli import start

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "lm_eval": "lm-eval"}
# Imported where a flag asks for them, with a message that names the package.
ON_REQUEST = {"apollo-torch", "galore-torch", "liger-kernel"}
OPTIONAL = {"apollo-torch", "galore-torch", "schedulefree"}  # beside the tests' own packages


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {name_of(line) for line in listed}


def imported(folder: str) -> dict[str, str]:
    """Package -> a file below the folder that imports it, on top or inside of a function."""
    paths = [path for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts]
    own = {"tokentune", "tests", "scripts"}
    own |= {path.stem for part in ("scripts", "tests") for path in (ROOT / part).rglob("*.py")}
    own |= {path.parent.name for part in ("scripts", "tests") for path in (ROOT / part).rglob("*.py")}
    found: dict[str, str] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {module.partition(".")[0] for module in modules} - own - set(sys.stdlib_module_names):
                found[PACKAGES.get(module, module.lower().replace("_", "-"))] = str(path.relative_to(ROOT))
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("tokentune", ["train"]), ("scripts", ["train", "eval", "test"]), ("tests", ["train", "eval", "test"])],
)
def test_every_import_is_declared(folder: str, extras: list[str]) -> None:
    missing = {name: path for name, path in imported(folder).items() if name not in declared(*extras) | ON_REQUEST}
    assert not missing


def pinned(file: str) -> set[str]:
    """The packages in a file of requirements, each with its version."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert all("==" in line for line in packages)
    return {name_of(line) for line in packages}


def test_every_declared_package_is_pinned() -> None:
    """A user installs what the commands need, and no more."""
    assert pinned("requirements.txt") == declared("train")
    assert pinned("scripts/eval/requirements.txt") == declared("eval") - declared()
    assert pinned("tests/requirements.txt") - OPTIONAL == declared("test") - declared()
    for file, included in (("scripts/eval", "../../requirements.txt"), ("tests", "../scripts/eval/requirements.txt")):
        assert f"\n-r {included}\n" in (ROOT / file / "requirements.txt").read_text(encoding="utf-8")


def test_a_command_looks_for_all_that_it_imports() -> None:
    """A package that a run imports at its end, to draw a picture, is asked for at its beginning."""
    asked = {*start.PACKAGES, *(package for packages in start.PACKAGES_OF.values() for package in packages)}
    asked = {PACKAGES.get(name, name.lower().replace("_", "-")) for name in asked}
    assert imported("tokentune").keys() - ON_REQUEST == asked


@pytest.mark.parametrize(("command", "package"), [("finetune", "matplotlib"), ("classify", "seqeval")])
def test_a_package_that_is_not_installed_is_named(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(SystemExit) as ended:
        start.start(command, ["--model_name_or_path", "m", "--dataset_name_or_path", "d"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f" lacks {package}. " in said and said.endswith("pip install '.[train]'\n") and said.count("\n") == 1


def test_windows_is_told_that_it_is_not_served() -> None:
    """What it lacks is imported in one place, which says so; the method alone does not come by there."""
    files = [path for path in (ROOT / "tokentune").rglob("*.py") if path.name != "posix.py"]
    lacking = re.compile(r"^\s*(import|from) (fcntl|resource|pwd|grp|termios|pty)\b", re.MULTILINE)
    assert not [path for path in files if lacking.search(path.read_text(encoding="utf-8"))]
    code = "import sys, tokentune\nprint('tokentune.posix' in sys.modules)\nsys.modules['fcntl'] = None\n"
    words = [sys.executable, "-c", f"{code}import tokentune.training.checkpoints.run_lock"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "False\n"
    assert "ImportError: TokenTune's commands run on Linux and macOS" in done.stderr.splitlines()[-1]
    assert {"Operating System :: MacOS", "Operating System :: POSIX :: Linux"} <= set(PROJECT["classifiers"])
