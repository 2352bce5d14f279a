"""--preview: tokens as text that can be read, roles that are training's, counts, and nothing done."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.inspection.preview import THEME, Document, mark_line, marked, show_preview
from tokentune.data.inspection.token_text import spelled, visible
from tokentune.data.instruction_data import InstructionData, load_instruction_data
from tokentune.data.prompts import PromptTemplate
from tokentune.errors import UserError
from tokentune.finetune import main
from tokentune.models.pretrained import load_tokenizer

ODD = "naïve 日本語 👩‍👩‍👧‍👦 🎉 “quoted”\n\ttwo  spaces"


def command(model: Path, data: Path, folder: Path, words: str = "") -> list[str]:
    names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--model_save_path", str(folder)]
    return [*names, "--report_to", "none", "--data_cache", "none", *words.split()]


def shown(argv: list[str], width: int = 90, colour: bool = False, vocabulary: int = 400) -> tuple[str, InstructionData]:
    """What the preview prints, and the data."""
    arguments = parse_arguments(argv)
    tokenizer = load_tokenizer(arguments.model.model_name_or_path)
    template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
    data = load_instruction_data(arguments, tokenizer, template)
    options = {"force_terminal": True, "color_system": "truecolor"} if colour else {"color_system": None}
    console = Console(file=io.StringIO(), width=width, highlight=False, legacy_windows=False, **options)
    show_preview(data, tokenizer, arguments, vocabulary, console)
    return console.file.getvalue(), data


# ---- text ------------------------------------------------------------------------------------------------------------


def test_tokens_spell_the_text_whatever_bytes_they_are(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)  # of bytes: every character above is several tokens
    ids = tokenizer(ODD)["input_ids"]
    groups = spelled(ids, tokenizer)
    assert "".join(text for text, _ in groups) == ODD
    assert sum(count for _, count in groups) == len(ids)
    assert ("日", 3) in groups and ("t", 1) in groups


def test_sentencepiece_keeps_its_spaces(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "llama-tiny")
    ids = tokenizer(ODD)["input_ids"]
    groups = spelled(ids, tokenizer)
    assert "".join(text for text, _ in groups).replace("<s>", "").lstrip() == ODD
    assert groups[0] == ("<s>", 1) and ("🎉", 4) in groups


def test_bytes_that_are_no_text_end(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    start = tokenizer("日")["input_ids"][0]
    word = tokenizer("word")["input_ids"]
    groups = spelled([start] * 9 + word, tokenizer)
    assert sum(count for _, count in groups) == 9 + len(word)
    assert "".join(text for text, _ in groups).endswith("word")


def test_what_a_terminal_would_act_on_is_shown() -> None:
    assert visible("a\nb\tc") == "a⏎\nb⇥   c"
    assert visible("\x1b[31m\x07\r\x7f\x9b") == "␛[31m␇␍<U+007F><U+009B>"
    assert visible("\u202eabc\u2066\u2028\ud800") == "<U+202E>abc<U+2066><U+2028><U+D800>"
    assert visible("naïve 日本語 👩‍👩‍👧 “q”") == "naïve 日本語 👩‍👩‍👧 “q”"


# ---- roles -----------------------------------------------------------------------------------------------------------


def test_marks_stand_below_what_they_mark() -> None:
    line = Text.assemble("ab", ("日本", "learnt"), "c", ("d", "supervised"), " ")
    assert mark_line(line, {"supervised": "-", "learnt": "="}) == "  ==== -"
    assert mark_line(line, {"selected": "^"}) == ""


def test_roles_are_training_s(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    """Every mark of an example, against the batch that the first epoch makes of it."""
    words = "--tokentune --prefix_length 0.3 --add_eos_token --preview 16 --seed 3"
    text, data = shown(command(tiny_llama_dir, alpaca_file, tmp_path, words), width=2000)
    blocks = text.split("example ")[1:]
    assert len(blocks) == 16
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    seeded, collate = SeededRows(data.train, 3), CausalCollator(0, 0.3, "supervised")
    for row, block in enumerate(blocks):
        batch = collate([seeded[row]])
        ids, labels = seeded[row]["input_ids"], np.array(seeded[row]["labels"])
        learnt, selected = (batch["labels"][0] != -100).numpy(), set(batch["selected_positions"][0].tolist())
        counts = f"{len(ids)} tokens, {(labels != -100).sum()} supervised, {len(selected)} selected, {learnt.sum()} "
        assert counts + "selected and supervised" in block
        marks: dict[str, str] = {"loss": "", "selected": ""}
        characters, width = "", 0
        for line in block.splitlines():
            name, bar, rest = line.partition(" │ ")
            if not bar:
                continue
            if name.strip():
                marks[name.strip()] = marks[name.strip()].ljust(width) + rest
            else:
                characters, width = characters.ljust(0) + rest, len(characters)
        assert "⏎" in characters and "</s>" in characters
        expected = {"loss": "", "selected": ""}
        for place, (spelt, count) in enumerate(spelled(ids, tokenizer)):
            assert count == 1
            shape = visible(spelt).replace("\n", "")
            role = "=" if learnt[place] else "-" if labels[place] != -100 else " "
            expected["loss"] += role * len(shape)
            expected["selected"] += ("^" if place in selected else " ") * len(shape)
        assert {name: mark.rstrip() for name, mark in marks.items()} == {n: m.rstrip() for n, m in expected.items()}


def test_long_prompts_and_answers_lose_their_middle(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    (x,) = tokenizer("q")["input_ids"]
    supervised = np.arange(2000) >= 1000
    document = Document(0, [x] * 2000, supervised, supervised, np.zeros(2000, bool))
    text = marked(document, tokenizer)
    prompt, answer = "q" * 80, "q" * 150
    assert text.plain == (
        f"{prompt} [… 840 tokens of the prompt left out …] {prompt}"
        f"{answer} [… 700 tokens of the answer left out …] {answer}"
    )
    assert mark_line(text, {"supervised": "-"}).count("-") == 300
    short = Document(0, [x] * 240, supervised[:240], supervised[:240], np.zeros(240, bool))
    assert marked(short, tokenizer).plain == "q" * 240


def test_colours_are_used_on_a_terminal(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    argv = command(tiny_llama_dir, alpaca_file, tmp_path, "--tokentune --prefix_length 0.3 --preview 2")
    text, _ = shown(argv, colour=True)
    for style in ("supervised", "learnt", "selected", "prompt"):
        assert f"\x1b[{THEME.styles[style]._make_ansi_codes(3)}m" in text, style
    assert "│" not in text and "\n    loss" not in text
    plain, _ = shown(argv)
    assert "\x1b" not in plain and "    loss │ " in plain and "selected │ " in plain


# ---- counts ----------------------------------------------------------------------------------------------------------


def cells(text: str) -> dict[str, list[str]]:
    """The table: first column -> the others."""
    lines = [line.strip().split("   ") for line in text.splitlines()]
    return {line[0].strip(): [cell.strip() for cell in line[1:] if cell.strip()] for line in lines if len(line) > 1}


@pytest.mark.parametrize("corrected", [False, True])
def test_table_counts_what_training_would(
    corrected: bool, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    words = "--tokentune --prefix_length 0.3 --packing --max_length 320 --preview 1"
    words += " --selection random --gradient_correction 1" if corrected else ""
    words += f" --eval_dataset_name_or_path {alpaca_file}"
    text, data = shown(command(tiny_llama_dir, alpaca_file, tmp_path, words), width=120)
    table = cells(text)
    strategy = "random" if corrected else "supervised"
    collate, seeded = CausalCollator(0, 0.3, strategy, independent=corrected), SeededRows(data.train, 42)
    tokens, selected, learnt = np.sum(
        [[int(n) for n in collate.count(collate([seeded[r]]))] for r in range(16)], axis=0
    )
    assert table["rows"] == ["16", "16"]
    assert table["tokens"] == [f"{tokens:,}"] * 2
    assert table["supervised tokens"][0].startswith(f"{data.train_report.supervised_tokens:,} (")
    assert table["selected tokens (--prefix_length 0.3)"] == [f"{selected:,} ({selected / tokens:.1%})"]
    assert table["selected and supervised tokens"] == [f"{learnt:,} ({learnt / tokens:.1%})"]
    assert table["rows whose last answer has no end token"] == ["16 (100.0%)"] * 2
    (packed,) = table["packed rows of 320 tokens"]
    rows = int(packed.split()[0])
    assert packed == f"{rows} ({tokens / (320 * rows):.1%} full)"
    assert "warning: 16 of 16 validation rows are in the training data too" in text
    assert f"example 1 of 1, packed row {rows // 2 + 1} of {rows}: " in text


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["", "--tokentune --prefix_length 0.3 --packing --lora"])
@pytest.mark.usefixtures("no_weights_read")
def test_nothing_is_written_and_no_weight_read(
    method: str, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(command(tiny_llama_dir, alpaca_file, tmp_path / "models", f"{method} --max_length 320 --preview"))
    printed = capsys.readouterr().out
    assert printed.count("\nexample ") == (5 if "packing" not in method else min(5, printed.count("packed row ")))
    assert "### Response:" in printed and "\x1b" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_selection_by_scores_is_not_guessed(
    tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main(command(tiny_llama_dir, alpaca_file, tmp_path, "--tokentune --selection loss --max_length 320 --preview 2"))
    text = capsys.readouterr().out
    assert "Which of them are selected, the model's scores decide (--selection loss)." in text
    assert "selected and supervised" not in text and text.count("\nexample ") == 2


def test_refused_data_is_shown_first(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"instruction": "Say it.", "input": "", "output": "It."}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="training row 1 holds a token that the model has no embedding for"):
        shown(command(tiny_llama_dir, data, tmp_path, "--preview"), vocabulary=50)
    small = "--tokentune --prefix_length 1 --selection reference --seed 1 --preview"
    with pytest.raises(UserError, match="--prefix_length 1: the selection misses"):
        main(command(tiny_llama_dir, data, tmp_path, small))
    assert "### Response:" in capsys.readouterr().out


def test_real_rows_are_readable(shared: Path, tmp_path: Path) -> None:
    argv = command(
        shared / "models" / "llama-tiny",
        shared / "data" / "alpaca_en.validation.jsonl",
        tmp_path,
        "--tokentune --prefix_length 0.3 --max_length 512 --add_eos_token --preview 10",
    )
    text, _ = shown(argv, width=110, vocabulary=2048)
    assert text.count("\nexample ") == 10
    assert "\ufffd" not in text and "∅" not in text
    assert text.count("### Response:⏎") == 10
    assert max(map(len, text.splitlines())) <= 110
    assert cells(text)["rows that begin with two <s>"] == ["0"]
