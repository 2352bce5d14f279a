"""Bad input: one clear message, exit code 2, no traceback, nothing written, and no weight read before it is refused."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tokentune import finetune, preparation
from tokentune.errors import run_command

COMMAND = Path(__file__).resolve().parents[1] / "tokentune" / "finetune.py"


@pytest.fixture
def refused(
    tiny_llama_dir: Path,
    alpaca_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> Callable[..., str]:
    """Runs the command on good input with some flags replaced; checks that it is refused, returns the message."""

    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(preparation, "load_base_model", no_weights)
    output = tmp_path / "models"

    def run(*words: str) -> str:
        given = {"--model_name_or_path": str(tiny_llama_dir), "--dataset_name_or_path": str(alpaca_file)}
        given |= {"--model_save_path": str(output)}
        for flag in [flag for flag in given if flag in words]:
            given.pop(flag)
        argv = [word for pair in given.items() for word in pair] + list(words)
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: finetune.main(argv))
        assert ended.value.code == 2
        assert contents(tmp_path) == before
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        message = stderr[stderr.index("error: ") :]
        assert len(message.strip().splitlines()) <= 3
        return message

    return run


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


RECORD = json.dumps({"instruction": "Add 1 and 2.", "input": "", "output": "3"})


def test_good_input_gets_as_far_as_the_weights(refused: Callable[..., str]) -> None:
    """Else every test below could pass for a reason that has nothing to do with its flag."""
    with pytest.raises(AssertionError, match="weights were about to be loaded"):
        refused("--lora", "--tokentune", "--prefix_length", "0.3")


# ---- data ------------------------------------------------------------------------------------------------------------


def test_missing_column(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", json.dumps({"instruction": "x", "response": "y"}) + "\n")
    message = refused("--dataset_name_or_path", data)
    assert "'output'" in message and "'response'" in message and data in message


def test_empty_file(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "")
    message = refused("--dataset_name_or_path", data)
    assert "empty" in message and data in message


def test_malformed_line_is_told_with_its_number(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", f"{RECORD}\n{RECORD}\n{{'instruction': 'x'}}\n")
    message = refused("--dataset_name_or_path", data)
    assert "line 3" in message and data in message


def test_no_such_data_file(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--dataset_name_or_path", str(tmp_path / "none.jsonl"))
    assert "--dataset_name_or_path" in message and "none.jsonl" in message


def test_validation_data_is_checked_too(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", "{}\n")
    message = refused("--eval_dataset_name_or_path", data)
    assert data in message


def test_no_supervised_token_left(refused: Callable[..., str]) -> None:
    assert "--max_length 4" in refused("--max_length", "4")


def test_template_without_its_keys(refused: Callable[..., str], tmp_path: Path) -> None:
    template = write(tmp_path / "t.json", json.dumps({"prompt_no_input": "{instruction}"}))
    message = refused("--prompt_template_name_or_path", template)
    assert "prompt_input" in message and template in message


def test_template_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "none.json" in refused("--prompt_template_name_or_path", str(tmp_path / "none.json"))


# ---- model -----------------------------------------------------------------------------------------------------------


def test_unknown_model_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--model_name_or_path", str(tmp_path / "nothing"))
    assert "--model_name_or_path" in message and "no such folder" in message


def test_folder_without_a_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("--model_name_or_path", str(tmp_path / "empty"))


def test_model_of_another_kind(refused: Callable[..., str], tmp_path: Path, tiny_llama_dir: Path) -> None:
    from transformers import ViTConfig

    folder = tmp_path / "vit"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_dir / name).read_bytes())
    ViTConfig(vocab_size=400).save_pretrained(folder)
    assert f"--model_name_or_path {folder}" in refused("--model_name_or_path", str(folder))


def test_unknown_target_modules_are_told_with_the_known_ones(refused: Callable[..., str]) -> None:
    message = refused("--lora", "--lora_target_modules", "gate_proj", "query_key_value")
    assert "query_key_value" in message and "q_proj" in message and "down_proj" in message


def test_model_that_cannot_be_served_exactly(refused: Callable[..., str], tmp_path: Path, tiny_llama_dir: Path) -> None:
    """A state-space model mixes tokens outside of attention: selective backpropagation would be wrong, not slow."""
    from transformers import MambaConfig

    folder = tmp_path / "mamba"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_dir / name).read_bytes())
    MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(folder)
    assert "--tokentune cannot serve this model" in refused("--model_name_or_path", str(folder), "--tokentune")


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--dataset_name_or_path"])
def test_hub_id_while_offline(flag: str, refused: Callable[..., str]) -> None:
    message = refused(flag, "owner/name")
    assert f"{flag} owner/name" in message and "HF_HUB_OFFLINE" in message


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["0", "-1", "abc", "1.5", "nan"])
def test_prefix_length(length: str, refused: Callable[..., str]) -> None:
    message = refused("--tokentune", "--prefix_length", length)
    assert f"--prefix_length {length}" in message and "proportion" in message


def test_two_precisions(refused: Callable[..., str]) -> None:
    assert "--bf16 and --fp16 exclude each other" in refused("--bf16", "--fp16")


def test_accumulation_that_does_not_divide_the_batch(refused: Callable[..., str]) -> None:
    message = refused("--global_batch_size", "32", "--gradient_accumulation_steps", "5")
    assert "--gradient_accumulation_steps 5" in message and "--global_batch_size 32" in message


def test_typo_in_a_flag(refused: Callable[..., str]) -> None:
    assert "did you mean --learning_rate?" in refused("--learnin_rate", "1e-3")


def test_value_that_is_no_number(refused: Callable[..., str]) -> None:
    assert "--num_epochs" in refused("--num_epochs", "many")


# ---- output ----------------------------------------------------------------------------------------------------------


def test_output_folder_below_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "not a folder")
    message = refused("--model_save_path", f"{blocked}/models")
    assert "cannot be written" in message and "--model_save_path" in message


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that not even root can write to: /proc, of Linux")
def test_output_folder_that_is_not_writable(refused: Callable[..., str]) -> None:
    assert "/proc/models" in (message := refused("--model_save_path", "/proc/models"))
    assert "cannot be written" in message


# ---- as users run it -------------------------------------------------------------------------------------------------


def run_command_line(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # The hub's client waits between its five attempts: here it does not.
    hasty = f"import time, runpy; time.sleep = lambda s: None; runpy.run_path({str(COMMAND)!r}, run_name='__main__')"
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    clean |= {"HF_HOME": str(folder / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-c", hasty, *words],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@contextmanager
def hub_that_answers(status: int, code: str) -> Iterator[str]:
    """A hub on this machine that refuses every file as the real one does."""

    class Refusal(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} (test)")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_gated_hub_repository(alpaca_file: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", "owner/gated", "--dataset_name_or_path", str(alpaca_file)]
    with hub_that_answers(403, "GatedRepo") as address:
        ended = run_command_line(words, tmp_path, HF_ENDPOINT=address)
    assert ended.returncode == 2, ended.stderr
    assert "owner/gated" in ended.stderr and "gated" in ended.stderr and "HF_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "models").exists()


def test_hub_that_cannot_be_reached(tiny_llama_dir: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", "owner/data"]
    nobody = "http://127.0.0.1:9"  # the discard port: nothing listens
    ended = run_command_line(words, tmp_path, HF_ENDPOINT=nobody)
    assert ended.returncode == 2, ended.stderr
    message = ended.stderr[ended.stderr.index("error: ") :]
    assert "--dataset_name_or_path owner/data" in message and "local" in message
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "models").exists()
