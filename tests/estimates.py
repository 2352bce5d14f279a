"""What the tests of estimates share: settings from words, a model's configuration in a file, the command's report."""

import json
from pathlib import Path

from conftest import tiny_llama_config

from tokentune import estimate
from tokentune.cli.arguments import parse_arguments
from tokentune.settings.finetune import Arguments


def arguments_of(words: str = "", model: object = "m") -> Arguments:
    return parse_arguments(f"--model_name_or_path {model} --dataset_name_or_path d --report_to none {words}".split())


def config_file(folder: Path, **sizes: int) -> Path:
    path = folder / "config.json"
    tiny_llama_config(**sizes, architectures=["LlamaForCausalLM"]).to_json_file(path)
    return path


def report_of(folder: Path, *words: object) -> dict:
    """What estimate.py writes with --json."""
    target = folder / "numbers.json"
    estimate.main(["--model_name_or_path", *map(str, words), "--json", str(target)])
    return json.loads(target.read_text())
