"""The command from flags to files: what a run leaves, that it can be loaded again, and that it learnt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_rows import TEMPLATE, load
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokentune.core.patching
from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.finetune import main
from tokentune.models.fingerprint import fingerprint_of_checkpoint
from tokentune.models.pretrained import load_tokenizer

PROJECT = Path(__file__).resolve().parents[2]
SHORT = (
    "--global_batch_size 4 --warmup_steps 0 --learning_rate 5e-3 --max_length 128 --report_to none --logging_steps 1"
)


def run(model: Path, data: Path, folder: Path, words: str) -> Path:
    """Runs the command in this process and returns the run's folder."""
    names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--model_save_path", str(folder)]
    before = set(folder.glob("*"))
    main([*names, *SHORT.split(), *words.split()])
    (created,) = set(folder.glob("*")) - before
    return created


def read_summary(run_folder: Path) -> dict:
    return json.loads((run_folder / "training_summary.json").read_text(encoding="utf-8"))


def loss_per_token(model: nn.Module, rows: list[dict]) -> float:
    total = count = 0
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        targets = torch.tensor(row["labels"][1:])
        total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def lora_run(
    tiny_llama_dir: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict]]:
    """LoRA + TokenTune for two epochs, evaluated on its own data; and that data, encoded."""
    words = "--lora --tokentune --prefix_length 0.3 --num_epochs 2 --gradient_accumulation_steps 2 --save_steps 5 "
    words += f"--selection random --add_eos_token --eval_dataset_name_or_path {alpaca_file} --eval_steps 3"
    folder = run(tiny_llama_dir, alpaca_file, tmp_path_factory.mktemp("models"), words)
    rows = load(str(alpaca_file), words="--max_length 128 --add_eos_token", template=TEMPLATE,
                tokenizer=load_tokenizer(str(tiny_llama_dir))).train  # fmt: skip
    return folder, list(rows)


def test_folder_is_named_after_the_run_and_holds_the_adapter_alone(lora_run: tuple[Path, list[dict]]) -> None:
    folder, _ = lora_run
    assert folder.name == "tiny-llama-tiny_alpaca-lora-tokentune-0.3"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "checkpoint-5"} <= names
    assert {"training_summary.json", "training_curves.png"} <= names
    assert not [name for name in names if name.startswith("model") or name.endswith(".tmp")]
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_adapters_keep_the_fingerprint_of_their_base(lora_run: tuple[Path, list[dict]], tiny_llama_dir: Path) -> None:
    folder, _ = lora_run
    expected = fingerprint_of_checkpoint(str(tiny_llama_dir)).as_dict()
    for place in (folder, folder / "checkpoint-5"):
        assert json.loads((place / "base_fingerprint.json").read_text(encoding="utf-8")) == expected


def test_saved_adapter_gives_the_final_validation_loss(lora_run: tuple[Path, list[dict]], tiny_llama_dir: Path) -> None:
    folder, rows = lora_run
    losses = read_summary(folder)["validation_loss"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert losses["base"] == pytest.approx(loss_per_token(base, rows), rel=1e-5)
    adapted = PeftModel.from_pretrained(base, folder)
    assert losses["final"] == pytest.approx(loss_per_token(adapted, rows), rel=1e-5)
    assert losses["final"] < losses["base"]
    assert [point["step"] for point in losses["steps"]] == [0, 3, 6, 8]
    assert AutoTokenizer.from_pretrained(folder).pad_token is not None


def test_summary_tells_the_run(lora_run: tuple[Path, list[dict]], tiny_llama_dir: Path) -> None:
    folder, rows = lora_run
    summary = read_summary(folder)
    assert summary["schema_version"] == 1
    assert summary["optimizer_steps"] == 8 and summary["seed"] == 42
    assert (
        summary["settings"].keys()
        == parse_arguments(["--model_name_or_path", "a", "--dataset_name_or_path", "b"]).settings().keys()
    )
    assert summary["settings"]["model_name_or_path"] == str(tiny_llama_dir)

    supervised = sum(sum(label != -100 for label in row["labels"]) for row in rows)
    tokens = summary["tokens"]
    assert tokens["processed"] == 2 * sum(len(row["input_ids"]) for row in rows)
    assert tokens["supervised"] == 2 * supervised
    assert tokens["selected"] == 2 * sum(int(0.3 * len(row["input_ids"]) + 0.5) for row in rows)
    assert 0 < tokens["selected_supervised"] < tokens["supervised"]
    assert summary["data"]["train"]["supervised_tokens"] == supervised
    assert summary["data"]["validation"]["rows"] == len(rows) == 16

    assert [entry["step"] for entry in summary["log"]] == list(range(1, 9))
    losses = [entry["loss"] for entry in summary["log"]]
    assert summary["loss"] == pytest.approx({"first": sum(losses[:4]) / 4, "last": sum(losses[4:]) / 4, "window": 4})
    smoothed = [entry.pop("loss_smoothed") for entry in summary["log"]]
    assert smoothed[:3] == [None] * 3
    assert (smoothed[3], smoothed[7]) == (summary["loss"]["first"], summary["loss"]["last"])
    assert all(value is not None for entry in summary["log"] for value in entry.values())
    assert all(isinstance(entry["memory_peak_bytes"], int) for entry in summary["log"])
    assert summary["peak_memory_bytes"] >= max(entry["memory_allocated_bytes"] for entry in summary["log"])
    assert summary["saved_for_backward_bytes"] > 0
    assert summary["tokens_per_second"] == pytest.approx(tokens["processed"] / summary["training_seconds"])
    assert summary["training_seconds"] < summary["wall_seconds"]
    phases = summary["phases"]
    assert list(phases) == ["read", "tokenize", "load", "probe", "train", "evaluate", "save"]
    assert min(phases.values()) > 0 and sum(phases.values()) < summary["wall_seconds"]
    assert not [*folder.rglob("training_args.bin")]  # a pickle, also of the checkpoint-5
    assert summary["model"]["class"] == "LlamaForCausalLM" and summary["model"]["saved_dtype"] == "float32"
    assert 0 < summary["model"]["trainable_parameters"] < summary["model"]["parameters"]
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"]["type"] == "cuda" if torch.cuda.is_available() else "cpu"


def test_finished_run_is_refused_then_replaced(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    folder = run(tiny_llama_dir, alpaca_file, tmp_path, "--lora --save_steps 1")
    assert (folder / "checkpoint-4").is_dir()
    first = read_summary(folder)
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
    again = [*names, "--model_save_path", str(tmp_path), *SHORT.split(), "--lora"]
    with pytest.raises(UserError, match="already holds a finished run"):
        main(again)
    assert read_summary(folder) == first
    main([*again, "--overwrite_output_dir", "--seed", "7"])
    assert read_summary(folder)["seed"] == 7
    assert not list(folder.glob("checkpoint-*"))


def test_full_training_keeps_the_checkpoint_s_type(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(half)
    models = tmp_path / "models"
    words = f"--tokentune --prefix_length 12 --eval_dataset_name_or_path {alpaca_file}"
    folder = run(half, alpaca_file, models, words)
    assert folder.name == "half-tiny_alpaca-tokentune-12"
    summary = read_summary(folder)
    assert (summary["model"]["base_dtype"], summary["model"]["saved_dtype"]) == ("float32", "bfloat16")
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    saved = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(half)
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)
    assert saved.config.use_cache is True

    kept = run(half, alpaca_file, tmp_path / "held", "--base_dtype float32")
    assert {weight.dtype for weight in load_file(kept / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("length", ["1.0", "100000"])
def test_selecting_every_token_is_ordinary_training(
    length: str, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    plain = run(tiny_llama_dir, alpaca_file, tmp_path / "plain", "--lora --lora_dropout 0")
    every = run(
        tiny_llama_dir, alpaca_file, tmp_path / "all", f"--lora --lora_dropout 0 --tokentune --prefix_length {length}"
    )
    expected = load_file(plain / "adapter_model.safetensors")
    for name, weight in load_file(every / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)
    assert read_summary(every)["tokens"] == read_summary(plain)["tokens"]
    losses = [[entry["loss"] for entry in read_summary(folder)["log"]] for folder in (plain, every)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_same_seed_same_adapter(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    words = "--lora --tokentune --prefix_length 0.3"
    weights = {}
    for name, more in (("a", ""), ("b", " --num_workers 1"), ("c", " --seed 1")):
        folder = run(tiny_llama_dir, alpaca_file, tmp_path / name, words + more)
        weights[name] = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(weights["a"][key], weights["b"][key]) for key in weights["a"])
    assert not all(torch.equal(weights["a"][key], weights["c"][key]) for key in weights["a"])


def test_qlora_trains_over_four_bits(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    folder = run(tiny_llama_dir, alpaca_file, tmp_path, "--qlora --tokentune --prefix_length 0.3 --bf16")
    assert folder.name == "tiny-llama-tiny_alpaca-lora-qlora-tokentune-0.3"
    weights = load_file(folder / "adapter_model.safetensors")
    assert sum(weight.abs().sum() for name, weight in weights.items() if "lora_B" in name) > 0


@pytest.mark.parametrize("skip", [False, True])
def test_verification_can_be_skipped(
    skip: bool, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    real = tokentune.api.verified_profile
    monkeypatch.setattr(tokentune.api, "verified_profile", lambda model: verified.append(model) or real(model))
    run(tiny_llama_dir, alpaca_file, tmp_path, "--tokentune --prefix_length 0.3" + " --skip_verification" * skip)
    assert bool(verified) is not skip


def test_print_run_folder_prints_it_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["--model_name_or_path", "meta-llama/Llama-2-7b-hf", "--dataset_name_or_path", "garage-bAInd/Open-Platypus"]
    words = ["--model_save_path", str(tmp_path), "--lora", "--tokentune", "--prefix_length", "0.3"]
    main([*names, *words, "--print_run_folder"])
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path}/meta-llama-Llama-2-7b-hf-garage-bAInd-Open-Platypus-lora-tokentune-0.3\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "code"), [("--preview 1", 0), ("--print_run_folder", 0), ("--lora_alpha 0", 2)])
def test_what_needs_no_training_code_imports_none(
    words: str, code: int, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    heavy = ("bitsandbytes", "peft", "transformers.modeling_utils", "transformers.trainer")
    script = f"""
import atexit, runpy, sys
atexit.register(lambda: print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr))
runpy.run_path({str(PROJECT / "tokentune" / "finetune.py")!r}, run_name="__main__")
"""
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
    command = [sys.executable, "-c", script, *names, "--data_cache", "none", *words.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1] == ""


def test_command_runs_from_any_folder(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    """As users run it: a file, in a process of its own, elsewhere; lines of progress, and no bar in a pipe.

    The log has only what a user can act on, and ends with what to type next.
    """
    command = [sys.executable, "-u", str(PROJECT / "tokentune" / "finetune.py")]
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
    ended = subprocess.run(
        [*command, *names, *SHORT.split(), "--tokentune", "--lora"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "models" / "tiny-llama-tiny_alpaca-lora-tokentune-100" / "training_summary.json").is_file()
    lines = ended.stdout.strip().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/4" for step in range(1, 5)]
    assert not {"\r", "\x1b"} & {*ended.stdout, *ended.stderr}
    said = ended.stderr.splitlines()
    assert [line.split()[2] for line in said if line.startswith("INFO: time: ")] == [
        *("read", "tokenize", "load", "probe", "train", "save")
    ]
    assert said[-1].startswith(f"INFO: to talk to it: python {PROJECT}/tokentune/chat.py models/")
    assert all(line.startswith(("INFO: ", "WARNING: ")) for line in said), ended.stderr


def test_real_model_learns_real_data(shared: Path, tmp_path: Path) -> None:
    """48 rows: the validation loss falls, which it does not when the adapters get no gradient."""
    rows = (shared / "data" / "alpaca_en.train.jsonl").read_text(encoding="utf-8").splitlines()[:48]
    data = tmp_path / "alpaca48.jsonl"
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    held_out = (shared / "data" / "alpaca_en.validation.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    validation = tmp_path / "held_out.jsonl"
    validation.write_text("\n".join(held_out) + "\n", encoding="utf-8")
    words = "--lora --lora_target_modules all-linear --tokentune --prefix_length 0.3 --max_length 192 --num_epochs 2 "
    words += f"--global_batch_size 8 --learning_rate 2e-3 --eval_dataset_name_or_path {validation}"
    folder = run(shared / "models" / "llama-tiny", data, tmp_path / "models", words)
    losses = read_summary(folder)["validation_loss"]
    assert losses["final"] < losses["base"] - 0.02


@pytest.mark.parametrize("adapters", ["", "--lora"])
def test_a_chunked_loss_needs_no_selection(
    adapters: str, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    """Ordinary training, with the same result and without the logits of all tokens among what is saved."""
    words = f"{adapters} --num_epochs 1 --gradient_checkpointing"
    saved, weights = [], []
    for chunks in ("off", "on"):
        folder = run(tiny_llama_dir, alpaca_file, tmp_path / chunks, f"{words} --chunked_loss {chunks}")
        saved.append(read_summary(folder)["saved_for_backward_bytes"])
        weights.append(load_file(folder / ("adapter_model.safetensors" if adapters else "model.safetensors")))
    assert saved[1] < saved[0]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
