"""The README is true: its tables are the results', its layout the folder's, its code runs, its commands parse."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama_config
from transformers import LlamaForCausalLM

from tokentune.cli.arguments import parse_arguments
from tokentune.sampling.sampler import select_positions

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_tables_are_made_from_the_results() -> None:
    script = ROOT / "scripts" / "figures" / "readme_tables.py"
    check = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_layout_lists_every_module() -> None:
    layout = README[README.index("```\ntokentune/") :].split("```")[1]
    layout = layout[: layout.index("\nscripts/")]
    modules = sorted(path.name for path in (ROOT / "tokentune").rglob("*.py") if path.name != "__init__.py")
    assert modules == sorted(re.findall(r"^ +(\w+\.py) ", layout, flags=re.MULTILINE))


def test_paths_exist() -> None:
    named = set(re.findall(r"(?:scripts|tests|tokentune)/[\w/]+\.(?:py|sh|json)", README))
    assert len(named) > 10
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_finetune_commands_parse() -> None:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    commands = [shlex.split(line) for line in text.splitlines() if "tokentune/finetune.py" in line]
    assert commands
    for words in commands:
        arguments = parse_arguments(words[words.index("./tokentune/finetune.py") + 1 :])
        assert arguments.selection.tokentune


def test_the_code_runs() -> None:
    _, code = blocks("python")
    model = LlamaForCausalLM(tiny_llama_config()).train()
    ids = torch.randint(3, 90, (2, 20))
    names = {"model": model, "ids": ids, "mask": torch.ones_like(ids), "labels": ids}
    names["positions"] = torch.arange(0, 20, 4).expand(2, -1)
    exec(code, names)
    assert names["out"].logits.shape == (2, 5, 96)
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert not hasattr(model, "_tokentune")


def test_a_strategy_of_ones_own_is_five_lines(tmp_path: Path) -> None:
    code, _ = blocks("python")
    (tmp_path / "rare.py").write_text(code, encoding="utf-8")
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    mask, ids = torch.ones(2, 8, dtype=torch.int64), torch.randperm(90)[:16].view(2, 8)
    positions = select_positions(mask, 3, strategy=f"{tmp_path / 'rare.py'}:rare", input_ids=ids)
    assert torch.equal(ids.gather(1, positions).sort(1).values, ids.topk(3, dim=1).values.flip(1))


@pytest.mark.parametrize("word", ["HF_TOKEN", "Apache", "bibtex", "--prefix_length"])
def test_says_what_users_look_for(word: str) -> None:
    assert word in README
