"""`--dry_run`: everything but the steps, told truly, and nothing written."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_input import contents
from classification_models import save_tiny_bert, save_tiny_vit, write_images, write_texts, write_words

from tokentune import classify, finetune
from tokentune.errors import UserError
from tokentune.settings import machine
from tokentune.training.checkpoints import disk_space

SHORT = "--global_batch_size 4 --gradient_accumulation_steps 2 --warmup_steps 0 --max_length 96 --learning_rate 5e-3"


@pytest.fixture
def command(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> list[str]:
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
    return [*names, "--model_save_path", str(tmp_path / "models"), *SHORT.split(), "--data_cache", "none"]


def numbers(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]*(?![\d.]|x)", line)]


def lines_of(out: str) -> dict[str, str]:
    """What is told, by the names of lines."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines() if "  " in line)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--lora --tokentune --prefix_length 0.3 --num_epochs 2",
        "--tokentune --prefix_length answers+0.2 --selection stratified --group_by_length",
        "--tokentune --prefix_length 0.3 --selection reference",
        "--max_steps 6 --qlora",
    ],
)
def test_says_what_the_run_then_does(
    words: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(tmp_path)
    finetune.main([*command, *words.split(), "--dry_run"])
    assert contents(tmp_path) == before
    told = lines_of(capsys.readouterr().out)

    finetune.main([*command, *words.split(), "--report_to", "none"])
    (folder,) = (tmp_path / "models").iterdir()
    summary = json.loads((folder / "training_summary.json").read_text(encoding="utf-8"))
    assert told["run folder"] == str(folder)
    assert numbers(told["steps"])[:2] == [summary["optimizer_steps"], 4]
    assert "(2 x 2 micro-batches x 1 processes)" in told["steps"]
    if "tokentune" in words:
        share = numbers(told["tokens"])[2] / numbers(told["tokens"])[0]
        assert f"selects {share:.0%} of the tokens, which predict " in told["selection"]
    else:
        assert told["selection"].startswith("19% of the tokens predict an answer's: --tokentune")
    model = summary["model"]
    assert told["model"].startswith(
        f"{model['class']}, {model['parameters']:,} parameters, {model['trainable_parameters']:,} of them trained"
    )
    epochs = summary["tokens"]["processed"] / summary["data"]["train"]["tokens"]
    if "max_steps" not in words:
        assert numbers(told["tokens"])[0] * epochs == summary["tokens"]["processed"]
    if "tokentune" in words:
        assert numbers(told["tokens"])[2] * epochs == summary["tokens"]["selected"]
    else:
        assert "all get gradients" in told["tokens"]
    assert "at the peak of a step of 2 x " in told["memory"]


def test_says_what_the_run_would_be_refused_for(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "tiny-llama-tiny_alpaca"
    folder.mkdir(parents=True)
    (folder / "training_summary.json").write_text("{}", encoding="utf-8")
    finetune.main([*command, "--dry_run"])
    told = capsys.readouterr().out
    assert re.search(r"there already +\S+ already holds a finished run. Give this one a name of its own", told)
    assert re.search(r"disk +a result of about [\d.]+ MiB; [\d.]+ .iB are free\n", told)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    finetune.main([*command, "--dry_run", "--run_name", "another"])
    told = capsys.readouterr().out
    assert "there already" not in told and f"run folder  {folder.with_name('another')}\n" in told
    assert re.search(r"0\.0 MiB are free: the trained model could not be saved: it takes about ", told)
    with pytest.raises(UserError, match="could not be saved"):
        finetune.main([*command, "--run_name", "another"])
    assert not folder.with_name("another").exists()


def test_a_run_to_be_replaced_stays(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "models" / "tiny-llama-tiny_alpaca"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "training_summary.json").write_text("{}", encoding="utf-8")
    before = contents(tmp_path)
    finetune.main([*command, "--dry_run", "--overwrite_output_dir"])
    assert contents(tmp_path) == before
    assert "nothing was trained" in capsys.readouterr().out


def test_packed_rows_and_streams(command: list[str], capsys: pytest.CaptureFixture) -> None:
    finetune.main([*command, "--max_length", "256", "--packing", "--dry_run"])
    packed = capsys.readouterr().out
    finetune.main([*command, "--max_length", "256", "--streaming", "--max_steps", "3", "--dry_run"])
    streamed = capsys.readouterr().out
    steps = next(line for line in packed.splitlines() if line.startswith("steps"))
    assert numbers(steps)[0] < 4  # sixteen rows, in fewer ones
    assert re.search(r"a step of 2 x 2\d\d tokens", packed)
    assert "steps       3 of 4 rows" in streamed and "a step of 2 x 256 tokens" in streamed


def test_kernels_that_cannot_be_estimated_are_told_in_words(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(machine, "has_accelerator", lambda: True)  # as on a machine where flex_attention can train
    finetune.main([*command, "--attn_implementation", "flex_attention", "--dry_run"])
    told = "memory      not estimated: the kernels of --attn_implementation flex_attention run on real tensors alone"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task_type", "words", "labels"),
    [
        ("text", "--seeds 1 2", "cold 10 (50.0%), warm 10 (50.0%)"),
        ("text", "--tokentune --prefix_length 4 --lora", "cold 10 (50.0%), warm 10 (50.0%)"),
        ("token", "--tokentune --prefix_length answers+0.1", "B-person 20 ("),
        ("image", "--tokentune --prefix_length 0.5", "column 10 (50.0%), row 10 (50.0%)"),
    ],
)
def test_says_what_a_classification_then_does(
    task_type: str, words: str, labels: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write = {"text": write_texts, "token": write_words, "image": write_images}[task_type]
    model = (save_tiny_vit if task_type == "image" else save_tiny_bert)(tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", 20, seed=0)
    argv = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--task_type", task_type]
    argv += ["--eval_dataset_name_or_path", str(data), "--test_dataset_name_or_path", str(data)]
    argv += ["--model_save_path", str(tmp_path / "models"), "--num_epochs", "1", "--max_length", "32", *words.split()]
    argv += ["--global_batch_size", "8", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2"]
    before = contents(tmp_path)
    classify.main([*argv, "--dry_run"])
    assert contents(tmp_path) == before
    told = lines_of(capsys.readouterr().out)

    classify.main([*argv, "--report_to", "none"])
    (folder,) = (tmp_path / "models").iterdir()
    summary = json.loads(next(folder.rglob("training_summary.json")).read_text(encoding="utf-8"))
    assert told["run folder"] == str(folder)
    assert told["steps"].startswith(f"{summary['optimizer_steps']} of 8 rows (4 x 2 micro-batches x 1 processes)")
    assert told["model"].startswith(f"{summary['model']['class']}, {summary['model']['parameters']:,} parameters")
    assert told.get("seeds") == ("1 2" if "seeds" in words else None)
    assert numbers(told["train data"])[0] == summary["data"]["train"]["rows"]
    for split in ("train", "validation", "test"):
        assert told[f"{split} labels"].startswith(labels), split
    of_run = summary["tokens"]
    assert numbers(told["tokens"])[0] == of_run["processed"]
    if "tokentune" in words:
        assert numbers(told["tokens"])[2] == of_run["selected"]
    image = told["memory"] == "not estimated: steps on images cannot be run without data"
    assert image if task_type == "image" else "at the peak of a step of 4 x " in told["memory"]


def test_says_what_a_classification_would_be_refused_for(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = save_tiny_bert(tmp_path / "model"), write_texts(tmp_path / "rows.jsonl", 20, seed=0)
    argv = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--run_name", "mine"]
    argv += ["--eval_dataset_name_or_path", str(data), "--model_save_path", str(tmp_path / "models")]
    argv += ["--max_length", "32", "--seeds", "1", "2"]
    folder = tmp_path / "models" / "mine"
    (folder / "seed-1").mkdir(parents=True)
    classify.main([*argv, "--dry_run"])
    told = lines_of(capsys.readouterr().out)
    assert told["there already"].startswith(f"{folder} already holds the checkpoints of an unfinished run. Give this")
    sizes = re.fullmatch(
        r"up to 2 checkpoints of about ([\d.]+) MiB at once, a result of about ([\d.]+) MiB; [\d.]+ .iB are free",
        told["disk"],
    )
    assert float(sizes[2]) == pytest.approx(2 * float(sizes[1]), abs=0.2)  # of both seeds; checkpoints: weights alone
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="could not be saved"):
        classify.main([*argv, "--overwrite_output_dir"])
    assert (folder / "seed-1").is_dir()
