"""What `import tokentune` needs: torch and transformers, and what these two need themselves."""

import subprocess
import sys
import typing
from pathlib import Path

import pytest

from tokentune import apply_tokentune, remove_tokentune

PROJECT = Path(__file__).resolve().parents[2]
# What torch and transformers run without. Each is found by no finder, as if it was not installed.
HIDE = """
import sys

HIDDEN = {"accelerate", "bitsandbytes", "datasets", "deepspeed", "matplotlib", "pandas", "peft", "psutil", "pyarrow",
          "scipy", "sentencepiece", "sklearn", "tensorboard", "trl"}


class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path = [Finder(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""
TRAIN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokentune

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = tokentune.apply_tokentune(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train(), 0.3)
ids = torch.randint(3, 90, (2, 12))
model(input_ids=ids, labels=ids).loss.backward()
assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
"""


@pytest.mark.parametrize("code", ["import tokentune", TRAIN], ids=["import", "a step"])
def test_torch_and_transformers_are_enough(code: str) -> None:
    missing = "\ntry:\n    import accelerate\nexcept ModuleNotFoundError:\n    print('hidden')\n"
    command = [sys.executable, "-c", HIDE + code + missing]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "hidden", done.stderr


@pytest.mark.parametrize("function", [apply_tokentune, remove_tokentune])
def test_a_patched_model_has_the_type_of_the_given_one(function: typing.Callable) -> None:
    hints = typing.get_type_hints(function)
    assert isinstance(hints["model"], typing.TypeVar) and hints["return"] is hints["model"]
