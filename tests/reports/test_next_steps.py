"""The last lines of a run's log: commands that work when they are typed."""

import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from classification_models import save_tiny_bert, write_texts

from tokentune import classify, finetune, merge
from tokentune.reports.next_steps import PACKAGE, prediction

SHORT = [f"--{flag}" for flag in ("global_batch_size=8", "warmup_steps=0", "learning_rate=1e-2", "max_steps=2")]
SHORT += ["--max_length=64"]


def last_lines(caplog: pytest.LogCaptureFixture) -> dict[str, list[str]]:
    """{what for: words of the command}."""
    found = [re.fullmatch(r"(to .*?): (.*)", record.message) for record in caplog.records]
    assert found[-1] is not None
    return {match[1]: shlex.split(match[2]) for match in found if match is not None}


def test_an_adapter_is_merged_and_talked_to(
    tiny_llama_dir: Path,
    alpaca_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where paths have spaces."""
    base = tmp_path / "my base"
    base.symlink_to(tiny_llama_dir)
    words = [
        "--model_name_or_path",
        base,
        "--dataset_name_or_path",
        alpaca_file,
        "--model_save_path",
        tmp_path / "my runs",
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tokentune"])
    with caplog.at_level(logging.INFO, "tokentune"):
        finetune.main([*map(str, words), *SHORT, "--lora"])
    (folder,) = (tmp_path / "my runs").iterdir()
    said = last_lines(caplog)
    assert said["to talk to it"] == ["tokentune", "chat", str(folder)]
    program, name, *words = said["to merge it into its base"]
    assert (program, name) == ("tokentune", "merge")
    merge.main(words)
    assert (folder / "merged" / "model.safetensors").is_file()


def test_commands_are_called_as_the_run_was(
    tiny_llama_dir: Path,
    alpaca_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [str(PACKAGE / "finetune.py")])
    words = [
        "--model_name_or_path",
        tiny_llama_dir,
        "--dataset_name_or_path",
        alpaca_file,
        "--model_save_path",
        tmp_path,
    ]
    with caplog.at_level(logging.INFO, "tokentune"):
        finetune.main([*map(str, words), *SHORT])
    said = last_lines(caplog)
    assert list(said) == ["to talk to it"]  # a whole model has nothing to be merged with
    assert said["to talk to it"][:2] == ["python", str(PACKAGE / "chat.py")]


def test_a_classifier_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bert, texts = save_tiny_bert(tmp_path / "bert"), write_texts(tmp_path / "texts.jsonl", 16, seed=0)
    words = ["--model_name_or_path", bert, "--dataset_name_or_path", texts, "--eval_dataset_name_or_path", texts]
    words += ["--model_save_path", tmp_path / "my runs", "--seeds", 1, 2]
    with caplog.at_level(logging.INFO, "tokentune"):
        classify.main([*map(str, words), *SHORT])
    program, *words = last_lines(caplog)["to use it"]
    assert program == "python" and "my runs/" in words[-1] and "/seed-" in words[-1]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    assert re.match(r"\[\{'label': '\w+', 'score': 0\.\d+\}\]", done.stdout)


def test_a_pair_is_given_as_a_pair() -> None:
    _, _, code = shlex.split(prediction("text", Path("it's"), pairs=True))
    assert code.endswith(
        """print(pipeline("text-classification", "it's")({"text": "A text.", "text_pair": "Another text."}))"""
    )
