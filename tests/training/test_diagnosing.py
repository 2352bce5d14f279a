"""`--diagnose_steps`: right figures, in every log, and training that does not notice."""

import json
from pathlib import Path

import pytest
import torch
from bad_input import check_sentence
from transformers import AutoTokenizer

from tokentune import finetune
from tokentune.cli.arguments import parse_arguments
from tokentune.data.prompts import PromptTemplate, ensure_pad_token
from tokentune.file_names import CURVES_NAME, SUMMARY_NAME
from tokentune.gradients.measuring import micro_batches, supervised_items, take_gradient
from tokentune.models.builder import make_selective, prepare_model
from tokentune.training.diagnosing import compared
from tokentune.training.trainer import training_collator


def run(model: Path, data: Path, folder: Path, *words: object) -> tuple[dict, dict[str, torch.Tensor]]:
    """The summary of a run of three steps, and its weights."""
    given = {"--model_name_or_path": model, "--dataset_name_or_path": data, "--model_save_path": folder}
    given |= {"--global_batch_size": 6, "--max_steps": 3, "--warmup_steps": 0, "--learning_rate": 0.01}
    given |= {"--data_cache": "none", "--report_to": "none", "--max_length": 64, "--logging_steps": 1}
    words = [*(word for pair in given.items() for word in pair), "--tokentune", "--skip_verification", *words]
    finetune.main(list(map(str, words)))
    (made,) = folder.iterdir()
    from safetensors.torch import load_file

    weights = load_file(next(made.glob("*.safetensors")))
    return json.loads((made / SUMMARY_NAME).read_text(encoding="utf-8")), weights


@pytest.mark.parametrize(
    "words",
    [
        ("--prefix_length", 0.4, "--lora", "--lora_dropout", 0.3, "--gradient_accumulation_steps", 3),
        ("--prefix_length", 0.4, "--packing", "--gradient_checkpointing"),
        ("--prefix_length", "0.3:0.5", "--selection", "supervised"),
        ("--prefix_length", 0.4, "--selection", "gradient"),
    ],
    ids=["dropout and accumulation", "packing and checkpointing", "schedule", "drawn by the model"],
)
def test_training_goes_on_bit_for_bit(words: tuple, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    plain, expected = run(tiny_llama_dir, alpaca_file, tmp_path / "plain", *words)
    diagnosed, weights = run(tiny_llama_dir, alpaca_file, tmp_path / "diagnosed", *words, "--diagnose_steps", 2)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for entry, before in zip(diagnosed["log"], plain["log"], strict=True):
        assert (entry["loss"], entry["grad_norm"]) == (before["loss"], before["grad_norm"])
        assert ("gradient_cosine" in entry) == (entry["step"] == 2)
    assert 0 < diagnosed["log"][1]["gradient_cosine"] < 1
    assert (tmp_path / "diagnosed" / Path(diagnosed["run_folder"]).name / CURVES_NAME).is_file()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_figures_are_those_of_the_two_gradients(
    accumulation: int, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One step over all 16 rows, against gradients that are taken by hand."""
    words = ["--prefix_length", 0.4, "--global_batch_size", 16, "--gradient_accumulation_steps", accumulation]
    summary, _ = run(tiny_llama_dir, alpaca_file, tmp_path, *words, "--diagnose_steps", 1, "--logging_steps", 3)
    entries = summary["log"]
    assert [entry["step"] for entry in entries] == [1, 2, 3]  # each is logged, whatever --logging_steps says
    assert "to full: cosine" in capsys.readouterr().out

    given = ["--model_name_or_path", tiny_llama_dir, "--dataset_name_or_path", alpaca_file, "--max_length", 64]
    given += ["--tokentune", "--prefix_length", 0.4, "--skip_verification", "--data_cache", "none"]
    arguments = parse_arguments(list(map(str, given)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = make_selective(prepare_model(arguments, torch.float32), arguments)
    ensure_pad_token(tokenizer, model.config.vocab_size)
    from tokentune.data.instruction_data import load_instruction_data
    from tokentune.data.streaming_rows import seeded_rows

    template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
    rows = seeded_rows(load_instruction_data(arguments, tokenizer, template).train, arguments.optimization.seed)
    gradients = []
    for tokentune in (True, False):
        arguments.selection.tokentune = tokentune
        batches = list(micro_batches(rows, training_collator(arguments, tokenizer, packed=False), 16))
        taken = take_gradient(model, batches, items=supervised_items(batches), bf16=False).gradient
        gradients.append(torch.cat([taken[name].flatten() for name in sorted(taken)]))
    selective, full = gradients
    assert entries[0]["grad_norm"] == pytest.approx(float(selective.norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(selective, full, dim=0)
    assert entries[0]["gradient_cosine"] == pytest.approx(float(cosine), rel=1e-5)
    error = (selective - full).norm() / full.norm()
    assert entries[0]["gradient_relative_error"] == pytest.approx(float(error), rel=1e-5)


def test_all_tokens_selected_leave_no_difference(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    summary, _ = run(tiny_llama_dir, alpaca_file, tmp_path, "--prefix_length", 1.0, "--diagnose_steps", 1)
    for entry in summary["log"]:
        assert entry["gradient_cosine"] == pytest.approx(1.0, abs=1e-6)
        assert entry["gradient_relative_error"] < 1e-5


def test_missing_gradients_are_zero() -> None:
    ones = torch.ones(4)
    assert compared([ones, None], [None, ones]) == {"gradient_cosine": 0.0, "gradient_relative_error": 2**0.5}
    assert compared([2 * ones, None], [ones, None]) == {"gradient_cosine": 1.0, "gradient_relative_error": 1.0}
    assert compared([ones], [None]) == {}


SENTENCES = [
    (["--diagnose_steps", "0", "--tokentune"], "--diagnose_steps 0: must be 1 or more"),
    (["--diagnose_steps", "5"], "--diagnose_steps 5 compares the selective gradient with the full one: add..."),
    (
        ["--diagnose_steps", "5", "--tokentune", "--optim_in_backward", "--max_grad_norm", "0"],
        "--diagnose_steps 5 compares whole gradients, of which an optimizer in the backward pass leaves none...",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), SENTENCES, ids=["zero", "nothing to compare", "in backward"])
def test_refusals(words: list[str], sentence: str, refused) -> None:
    check_sentence(refused(*words), sentence)


def test_several_processes_are_refused(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused("--diagnose_steps", "5", "--tokentune")
    check_sentence(said, "--diagnose_steps 5 compares gradients within one process, and DistributedDataParallel...")
