"""`--prefix_length answers` and `answers+0.1` from the command line: runs, previews, and what refuses them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classification_models import SHORT as SHORT_OF_ENCODERS
from classification_models import save_tiny_bert, write_words
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokentune import classify, estimate, finetune
from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate, encode_answers
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


# --- adapters on answers alone ----------------------------------------------------------------------------------------

ON_ANSWERS = "--lora --lora_on answers --lora_target_modules all-linear"


def test_adapters_on_answers_alone(
    tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What is told before the run, the run itself with a validation, and the adapter as others load it."""
    words = f"{SHORT} {ON_ANSWERS} --tokentune --prefix_length answers --learning_rate 5e-2 --lora_dropout 0"
    words += f" --gradient_checkpointing --eval_dataset_name_or_path {ten_rows} --eval_steps 1"
    finetune.main(command(tiny_llama_dir, ten_rows, tmp_path / "models", f"{words} --dry_run"))
    plan = capsys.readouterr().out
    finetune.main(command(tiny_llama_dir, ten_rows, tmp_path / "models", words))
    name = "tiny-llama-ten-lora-on-answers-tokentune-answers"
    folder, summary = tmp_path / "models" / name, summary_of(tmp_path / "models", name)
    tokens, data = summary["tokens"], summary["data"]["train"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    invocation = PeftConfig.from_pretrained(folder).alora_invocation_tokens
    assert tokenizer.decode(invocation) == "### Response:\n"
    assert tokens["selected_supervised"] == data["supervised_tokens"]
    assert tokens["selected"] == data["supervised_tokens"] + data["rows"] * len(invocation)
    assert f"{tokens['selected']:,} of them selected for gradients" in plan and "at the peak of a step" in plan
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "peft's activated LoRA" in card and "past_key_values" in card

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    served = PeftModel.from_pretrained(base, folder).eval()
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    records = [json.loads(line) for line in ten_rows.read_text(encoding="utf-8").splitlines()]
    loss = count = 0.0
    for record in records:
        row = encode_answers(
            [(template.prompt(record["instruction"], ""), record["output"])], tokenizer, add_eos_token=False
        )[0]
        ids, labels = (torch.tensor([values[:256]]) for values in (row.ids, row.labels))
        targets = int((labels != -100).sum())
        with torch.no_grad():
            loss, count = loss + served(input_ids=ids, labels=labels).loss.item() * targets, count + targets
    validation = summary["validation_loss"]
    assert loss / count == pytest.approx(validation["final"], rel=1e-4)
    assert validation["final"] < validation["base"] - 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokentune --prefix_length 0.3", "take --prefix_length answers, or --lora_on all"),
        ("--tokentune --prefix_length answers+0.1", "take --prefix_length answers, or --lora_on all"),
        ("--tokentune --prefix_length answers --packing", "--packing with --lora_on answers"),
        ("--streaming --max_steps 3", "--streaming with --lora_on answers"),
        ("--tokentune --prefix_length answers --diagnose_steps 1", "there is nothing to compare"),
        ("--lora_target_modules lm_head", "cannot tell which tokens it gets"),
        ("--lora_target_modules embed_tokens", "With --lora_on answers take linear layers alone"),
    ],
)
def test_what_adapters_on_answers_alone_do_not_go_with(words: str, message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*f"--lora --lora_on answers {words}".split())


def test_adapters_on_answers_alone_without_a_selection(tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path) -> None:
    words = f"{SHORT} {ON_ANSWERS} --gradient_checkpointing --eval_dataset_name_or_path {ten_rows} --learning_rate 5e-2"
    finetune.main(command(tiny_llama_dir, ten_rows, tmp_path / "models", words))
    validation = summary_of(tmp_path / "models", "tiny-llama-ten-lora-on-answers")["validation_loss"]
    assert validation["final"] < validation["base"] - 0.1


def test_an_estimate_of_adapters_on_answers_alone(
    tiny_llama_dir: Path, ten_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The generation prompt is selected too."""
    found = {}
    for where in ("all", "answers"):
        words = f"--lora --lora_on {where} --tokentune --prefix_length answers --only --device cpu --max_length 512"
        words += f" --dataset_name_or_path {ten_rows} --json {tmp_path / 'numbers.json'} --global_batch_size 2"
        estimate.main(["--model_name_or_path", str(tiny_llama_dir), *words.split()])
        (row,) = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["rows"]
        assert row["reason"] is None
        found[where] = row["bytes"]["activations"]
    assert found["all"] < found["answers"] < 1.5 * found["all"]
