"""--preview of classify.py: labels and selection are training's, counts are the data's, and nothing is done."""

import re
from pathlib import Path

import numpy as np
import pytest
from bad_input import contents
from classification_models import save_tiny_bert, save_tiny_vit, write_images, write_lines, write_texts, write_words
from transformers import AutoTokenizer

from tokentune.classify import main
from tokentune.cli.arguments import parse_arguments
from tokentune.cli.labelled import read_labelled
from tokentune.data.collators import SeededRows
from tokentune.data.inspection.token_text import spelled
from tokentune.settings.classification import ClassificationArguments
from tokentune.training.classification import training_collator


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def command(model: Path, data: Path, words: str) -> list[str]:
    argv = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--max_length", "32"]
    return [*argv, "--eval_dataset_name_or_path", str(data), "--model_save_path", str(data.parent), *words.split()]


def shown(argv: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    """The blocks that the preview prints: legend, examples, and in the last one the table too."""
    main(argv)
    return capsys.readouterr().out.split("example ")


def marks(block: str, name: str) -> str:
    """The line of marks below a text of one line."""
    return next((line.partition(" │ ")[2] for line in block.splitlines() if line.strip().startswith(f"{name} │")), "")


def table_of(block: str) -> dict[str, list[str]]:
    """The table of counts: a row's columns by its name."""
    rows = (re.split(r"  +", line.strip()) for line in block.splitlines())
    return {name: columns for name, *columns in rows if columns}


@pytest.mark.parametrize("method", ["", "--tokentune --prefix_length 4 --seed 3"])
def test_texts_and_their_labels(method: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_texts(tmp_path / "texts.jsonl", 6, seed=0)
    before = contents(tmp_path)
    legend, *blocks = shown(command(bert, data, f"--preview 6 {method}"), capsys)
    assert len(blocks) == 6 and contents(tmp_path) == before
    assert [block.split("label ")[1].split()[0] for block in blocks] == ["cold", "warm"] * 3
    assert all((" tokens, 4 selected; label" in block) == bool(method) for block in blocks)
    assert ("keeps gradients" in legend) == bool(method) and "carries the loss" not in legend
    table = table_of(blocks[-1])
    assert table["rows"] == table["labels"] == ["6", "6"] and table["cold"] == table["warm"] == ["3 (50.0%)"] * 2
    assert ("selected tokens (--prefix_length 4)" in table) == bool(method)


def test_words_and_their_selection_are_training_s(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_words(tmp_path / "words.jsonl", 5, seed=0)
    argv = command(bert, data, "--task_type token --tokentune --prefix_length 0.4 --seed 3 --preview 5")
    _, *blocks = shown(argv, capsys)
    arguments = parse_arguments(argv, ClassificationArguments)
    inputs = read_labelled(arguments)
    rows = SeededRows(inputs.data.train.rows, 3)
    collate = training_collator(inputs.skeleton, rows.rows, inputs.processing, arguments, inputs.data.labels)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for row, block in enumerate(blocks):
        item, batch = rows[row], collate([rows[row]])
        labels, selected = np.array(item["labels"]) != -100, set(batch["selected_positions"][0].tolist())
        learnt = [position for position in np.flatnonzero(labels) if position in selected]
        told = f"{len(item['input_ids'])} tokens, {labels.sum()} labelled, {len(selected)} selected, {len(learnt)} "
        assert f"{told}selected and labelled" in block
        pieces = tokenizer.convert_ids_to_tokens(item["input_ids"])
        texts = spelled(item["input_ids"], tokenizer)  # spaces before words among them
        assert len(texts) == len(pieces)
        assert marks(block, "loss").count("=") == sum(len(texts[position][0]) for position in learnt)
        for position in np.flatnonzero(labels):
            name = inputs.data.labels.names[item["labels"][position]]
            assert name == "O" or f"{pieces[position]}" in block.split(name)[0]
        assert "B-person" in block and " words O" in block


def test_images_and_a_test_file_with_numbers(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pictures = write_images(tmp_path / "bars", 4, seed=0)
    words = "--task_type image --tokentune --prefix_length 5 --preview 2"
    _, first, second = shown(command(save_tiny_vit(tmp_path / "vit"), pictures, words), capsys)
    assert "row 2: 17 tokens, 5 selected; label column" in first and ".png" in first
    assert "selected: 0, " in first, "the class token is always selected"
    assert "label row" in second and table_of(second)["column"] == ["2 (50.0%)"] * 2
    rows = write_lines(tmp_path / "n.jsonl", [{"text": "we saw", "label": n / 4} for n in range(5)])
    *_, last = shown(command(bert, rows, f"--preview --test_dataset_name_or_path {rows}"), capsys)
    assert "label 1" in last
    assert table_of(last)["mean label"] == ["0.5"] * 3  # training, validation, test
