"""`--report_to`: every tracker gets the run's settings and figures, and none of them can end a run that has begun."""

import json
import logging
import sys
import textwrap
from pathlib import Path

import pytest

from tokentune import finetune
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError

# Stand-ins for the packages, as far as the Trainer uses them; each records its calls.
STUBS = {
    "wandb/__init__.py": """
        class Config(dict):
            def update(self, other, allow_val_change=False):
                super().update(other)
        class Run:
            summary = {}
            def _label(self, code):
                pass
        calls, config, run = [], Config(), None
        def init(project, **given):
            global run
            run = Run()
            calls.append(("init", given))
        def log(figures):
            calls.append(("log", figures))
        def define_metric(*args, **kwargs):
            pass
        def termwarn(*args, **kwargs):
            calls.append(("warning", args))
    """,
    "wandb/sdk/__init__.py": "",
    "wandb/sdk/lib/__init__.py": "",
    "wandb/sdk/lib/config_util.py": "class ConfigError(Exception): pass",
    "trackio/__init__.py": """
        from contextvars import ContextVar
        class context_vars:
            current_space_id = ContextVar("space", default=None)
            current_project = ContextVar("project", default=None)
        class Config(dict):
            def update(self, other, allow_val_change=False):
                super().update(other)
        __version__, calls, config = "0.43.0", [], Config()
        def init(**given):
            calls.append(("init", given))
        def log(figures):
            calls.append(("log", figures))
        def finish():
            calls.append(("finish", None))
    """,
    "mlflow/__init__.py": """
        from types import SimpleNamespace
        __version__, calls, config, active = "3.1.0", [], {}, None
        utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        def is_tracking_uri_set():
            return False
        def active_run():
            return active
        def start_run(run_name, nested):
            global active
            active = SimpleNamespace(info=SimpleNamespace(run_id="1"))
            calls.append(("init", {"name": run_name}))
        def end_run():
            global active
            active = None
            calls.append(("finish", None))
        def log_params(params, synchronous=True):
            config.update(params)
        def log_metrics(metrics, step, synchronous=True):
            calls.append(("log", metrics))
    """,
}
SHORT = "--global_batch_size 4 --warmup_steps 0 --max_length 64 --learning_rate 5e-3 --logging_steps 1 --lora"
STUBBED = ("wandb", "trackio", "mlflow")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins, installed; the folder that they are in."""
    folder = tmp_path / "packages"
    for name, code in STUBS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(code), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in STUBBED]:
        del sys.modules[name]


@pytest.fixture
def run(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path):
    def run(words: str) -> Path:
        names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
        finetune.main([*names, "--model_save_path", str(tmp_path / "models"), *SHORT.split(), *words.split()])
        (folder,) = (tmp_path / "models").iterdir()
        return folder

    return run


def stub(name: str):
    return sys.modules[name]


def test_several_trackers_get_settings_and_figures(packages: Path, run) -> None:
    folder = run("--report_to wandb trackio mlflow tensorboard")
    losses = [entry["loss"] for entry in json.loads((folder / "training_summary.json").read_text())["log"]]
    assert len(losses) == 4
    for name in STUBBED:
        calls = stub(name).calls
        assert dict(calls)["init"]["name"] == folder.name
        key = "loss" if name == "mlflow" else "train/loss"
        assert [figures[key] for kind, figures in calls if kind == "log" and key in figures] == losses
        assert stub(name).config["learning_rate"] == 5e-3
        assert not [given for kind, given in calls if kind == "warning"]
    assert dict(stub("trackio").calls)["init"]["space_id"] is None  # it stays on this machine
    assert list((folder / "runs").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", STUBBED)
def test_one_that_fails_on_the_way_is_left_out(
    name: str, packages: Path, run, caplog: pytest.LogCaptureFixture
) -> None:
    others = " ".join(other for other in STUBBED if other != name)
    with (packages / name / "__init__.py").open("a", encoding="utf-8") as file:
        function = "log_metrics" if name == "mlflow" else "log"
        file.write(
            f"\n_working, _count = {function}, []\n"
            f"def {function}(*args, **kwargs):\n"
            "    _count.append(1)\n"
            "    if len(_count) > 2:\n"
            "        raise ConnectionError('the server is gone')\n"
            "    return _working(*args, **kwargs)\n"
        )
    with caplog.at_level(logging.WARNING, logger="tokentune"):
        folder = run(f"--report_to {name} {others}")
    assert (folder / "adapter_model.safetensors").is_file()
    assert len(json.loads((folder / "training_summary.json").read_text())["log"]) == 4
    warned = [record.getMessage() for record in caplog.records if "--report_to" in record.getMessage()]
    assert warned == [f"--report_to {name} failed at step 3 (the server is gone): the run goes on without it"]
    for other in others.split():
        assert len([kind for kind, _ in stub(other).calls if kind == "log"]) >= 4


def test_one_that_cannot_begin_ends_the_run(packages: Path, run, tmp_path: Path) -> None:
    with (packages / "wandb" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\ndef init(**given):\n    raise RuntimeError('api_key not configured (no-tty)')\n")
    with pytest.raises(UserError) as refused:
        run("--report_to wandb")
    assert str(refused.value) == (
        "--report_to wandb: cannot begin: api_key not configured (no-tty)\n"
        "Log in to it, let it work offline, or take --report_to none."
    )
    assert not list((tmp_path / "models").rglob("*.safetensors"))


@pytest.mark.parametrize("name", STUBBED)
def test_one_that_is_not_installed_is_refused(name: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_arguments(["--model_name_or_path", "a/b", "--dataset_name_or_path", "c/d", "--report_to", name])
    assert str(refused.value) == (
        f"--report_to {name}: the package is not installed; `pip install {name}`, or --report_to none"
    )
