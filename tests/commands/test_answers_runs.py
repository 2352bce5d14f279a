"""`--prefix_length answers` and `answers+0.1` from the command line: runs, previews, and what refuses them."""

import json
import re
from pathlib import Path

import pytest
from classification_models import SHORT as SHORT_OF_ENCODERS
from classification_models import save_tiny_bert, write_words

from tokentune import classify, estimate, finetune
from tokentune.errors import UserError
from tokentune.sampling.sampler import answers_count
from tokentune.sampling.schedule import Answers

SHORT = "--global_batch_size 4 --gradient_accumulation_steps 2 --warmup_steps 0 --max_length 256 --report_to none "


@pytest.fixture
def ten_rows(tmp_path: Path) -> Path:
    """Answers of very different lengths, so that rows of a batch select different numbers of tokens."""
    records = [{"instruction": f"Say {n} times.", "input": "", "output": "word " * (1 + n * n)} for n in range(10)]
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def command(model: Path, data: Path, folder: Path, words: str) -> list[str]:
    names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--model_save_path", str(folder)]
    return [*names, *words.split()]


def summary_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "training_summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "method",
    [
        "--prefix_length answers",
        "--prefix_length answers+0.1 --lora",
        "--prefix_length answers+0.1 --gradient_checkpointing --chunked_loss on --selection stratified",
        "--prefix_length answers+0.1 --packing",
        "--prefix_length answers+0.1 --diagnose_steps 1",
        "--prefix_length answers+0.1 --gradient_correction 1 --packing",
    ],
)
def test_every_supervised_token_is_learnt_from(
    method: str, tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    finetune.main(command(tiny_llama_dir, ten_rows, folder, f"{SHORT} --tokentune {method}"))
    size = method.split()[1]
    lora = "-lora" if "--lora" in method else ""
    summary = summary_of(folder, f"tiny-llama-ten{lora}-tokentune-{size}")
    tokens, data = summary["tokens"], summary["data"]["train"]
    assert tokens["selected_supervised"] == data["supervised_tokens"]
    assert tokens["processed"] == data["tokens"]
    others = tokens["selected"] - tokens["selected_supervised"]
    share = float(size.partition("+")[2] or 0)
    expected = share * (tokens["processed"] - tokens["selected_supervised"])
    chance = 4 * expected**0.5 if "correction" in method else 0.0
    assert others == pytest.approx(expected, abs=5 + chance)


@pytest.mark.parametrize(
    "method",
    [
        "",
        "--packing",
        "--selection_pass --lora",
        "--gradient_checkpointing --diagnose_steps 1",
    ],
)
def test_a_corrected_run_selects_tokens_one_by_one(
    method: str, tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path
) -> None:
    words = f"{SHORT} --tokentune --prefix_length 0.3 --selection random --gradient_correction 1 {method}"
    finetune.main(command(tiny_llama_dir, ten_rows, tmp_path / "models", words))
    lora = "-lora" if "--lora" in method else ""
    summary = summary_of(tmp_path / "models", f"tiny-llama-ten{lora}-tokentune-0.3")
    tokens, data = summary["tokens"], summary["data"]["train"]
    for selected, of_all in (
        (tokens["selected"], tokens["processed"]),
        (tokens["selected_supervised"], data["supervised_tokens"]),
    ):
        assert 0 < abs(selected - 0.3 * of_all) < 4 * (0.21 * of_all) ** 0.5  # standard deviations


def test_a_schedule_of_shares(tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path) -> None:
    words = f"{SHORT} --tokentune --prefix_length answers+0.5:answers"
    finetune.main(command(tiny_llama_dir, ten_rows, tmp_path / "models", words))
    tokens = summary_of(tmp_path / "models", "tiny-llama-ten-tokentune-answers+0.5-answers")["tokens"]
    assert tokens["selected_supervised"] < tokens["selected"] < tokens["processed"]


@pytest.mark.parametrize("size", ["answers", "answers+0.1"])
def test_the_preview_counts_the_selection(
    size: str, tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = f"{SHORT} --tokentune --prefix_length {size} --preview 10"
    finetune.main(command(tiny_llama_dir, ten_rows, tmp_path / "models", words))
    printed = capsys.readouterr().out

    def count(name: str) -> int:
        return int(re.search(rf"^\s*{re.escape(name)}\s+([\d,]+)", printed, re.MULTILINE)[1].replace(",", ""))

    selected, supervised = count(f"selected tokens (--prefix_length {size})"), count("supervised tokens")
    assert supervised == count("selected and supervised tokens")
    assert selected == supervised if size == "answers" else selected > supervised


def test_counts_of_a_row() -> None:
    assert [answers_count(Answers(0.1), *of_row) for of_row in ((3, 23), (3, 3), (0, 4), (0, 0))] == [5, 3, 1, 0]


def test_words(tmp_path: Path) -> None:
    bert, data = save_tiny_bert(tmp_path / "tiny-bert"), write_words(tmp_path / "words.jsonl", 16, seed=0)
    held_out = write_words(tmp_path / "held_out.jsonl", 8, seed=1)
    words = f"{SHORT_OF_ENCODERS} --task_type token --num_epochs 1 --tokentune --prefix_length answers+0.5"
    words += f" --eval_dataset_name_or_path {held_out}"
    classify.main(command(bert, data, tmp_path / "models", words))
    name = "tiny-bert-words-token-tokentune-answers+0.5"
    tokens = summary_of(tmp_path / "models", name)["tokens"]
    assert tokens["selected_labels"] == tokens["labels"] < tokens["selected"] <= tokens["processed"]
    report = json.loads((tmp_path / "models" / name / "classification_summary.json").read_text(encoding="utf-8"))
    assert report["method"]["prefix_length"] == "answers+0.5"


def test_an_estimate_refuses_it(tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match="depends on the rows' answers"):
        estimate.main(f"--model_name_or_path {tiny_llama_dir} --tokentune --prefix_length answers".split())
