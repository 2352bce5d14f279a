"""Bad input as users give it, to a process of its own: one sentence, exit code 2, no traceback, nothing written.

`test_bad_input_flags.py`, `..._data.py` and `..._models.py` have the sentences, case by case, in this process.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[2] / "tokentune" / "finetune.py"


def test_good_input_gets_as_far_as_the_weights(refused: Callable[..., str]) -> None:
    """Else every case of bad input could pass for a reason that has nothing to do with it."""
    with pytest.raises(AssertionError, match="weights were about to be loaded"):
        refused("--lora", "--tokentune", "--prefix_length", "0.3")


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
