"""`--offline` asks the network for nothing, and no run is lost because the hub cannot be reached when it is saved."""

import os
import shutil
import socket
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants as hub_constants
from peft import PeftModel
from safetensors.torch import load_file

from tokentune import finetune
from tokentune.errors import UserError
from tokentune.training import offline

SHORT = "--global_batch_size 8 --warmup_steps 0 --max_length 64 --lora --learning_rate 5e-3 --report_to none"
CACHED = "nobody/tiny-llama"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An online machine whose network is cut; the attempts to use it are listed."""
    attempts: list[object] = []

    def refuse(self: object, *address: object) -> None:
        attempts.append(address or self)
        raise OSError("the network is cut")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client waits between its attempts
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", *offline.OFFLINE_TRACKERS):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return attempts


@pytest.fixture
def cached(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny model as a hub id of which the hub's cache has a copy."""
    cache = tmp_path / "cache"
    repository = cache / f"models--{CACHED.replace('/', '--')}"
    shutil.copytree(tiny_llama_dir, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache))
    return CACHED


@pytest.mark.parametrize(("flag", "kind"), [("--model_name_or_path", "model"), ("--dataset_name_or_path", "data")])
def test_what_is_not_cached_is_said_without_a_question(
    flag: str, kind: str, asked: list[object], tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    names = {"--model_name_or_path": str(tiny_llama_dir), "--dataset_name_or_path": str(alpaca_file)}
    names |= {flag: f"nobody/{kind}", "--model_save_path": str(tmp_path / "models")}
    argv = [word for pair in names.items() for word in pair]
    with pytest.raises(UserError, match="cannot be reached"):  # what the network is asked without the flag
        finetune.main([*argv, *SHORT.split()])
    assert asked
    asked.clear()
    with pytest.raises(UserError) as refused:
        finetune.main([*argv, *SHORT.split(), "--offline"])
    assert str(refused.value) == (
        f"{flag} nobody/{kind}: no local folder of this name, not in the hub's cache, and --offline or "
        "HF_HUB_OFFLINE=1 forbids to download it. Give a local folder, or go online once."
    )
    assert asked == []
    assert not (tmp_path / "models").exists()


def test_what_is_cached_is_trained(asked: list[object], cached: str, alpaca_file: Path, tmp_path: Path) -> None:
    names = ["--model_name_or_path", cached, "--dataset_name_or_path", str(alpaca_file)]
    finetune.main([*names, "--model_save_path", str(tmp_path / "models"), *SHORT.split(), "--offline"])
    folder = tmp_path / "models" / "nobody-tiny-llama-tiny_alpaca-lora"
    assert load_file(folder / "adapter_model.safetensors")
    assert asked == []
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for worker processes
    assert os.environ["WANDB_MODE"] == "offline"


def test_a_finished_run_is_saved_without_network(
    asked: list[object], cached: str, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is a hub id, the network goes away during training, and --offline was not given."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)  # stands for a network that is there while loading
    save, saved = finetune.save_result, []

    def save_without_network(trainer: object, *rest: object) -> object:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        asked.clear()
        facts = save(trainer, *rest)
        saved.append(list(asked))
        assert hub_constants.HF_HUB_OFFLINE is False and "HF_HUB_OFFLINE" not in os.environ
        assert isinstance(trainer.model, PeftModel)
        trainer.model.save_pretrained(tmp_path / "unprotected")
        saved.append(list(asked))
        return facts

    monkeypatch.setattr(finetune, "save_result", save_without_network)
    names = ["--model_name_or_path", cached, "--dataset_name_or_path", str(alpaca_file)]
    finetune.main([*names, "--model_save_path", str(tmp_path / "models"), *SHORT.split()])
    protected, unprotected = saved
    assert protected == [] and unprotected
    folder = tmp_path / "models" / "nobody-tiny-llama-tiny_alpaca-lora"
    assert load_file(folder / "adapter_model.safetensors")
    assert (folder / "training_summary.json").is_file()


def test_offline_for_a_while_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    with pytest.raises(KeyError), offline.offline():
        assert hub_constants.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
        raise KeyError
    assert not hub_constants.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "0"
