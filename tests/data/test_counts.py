"""Counts that the user is told are what they say; and the bar that counts rows while they are tokenized."""

import io
import json
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from chat_tokenizers import CHATML, chat_tokenizer
from classification_models import tiny_tokenizer
from datasets import Dataset
from instruction_rows import ALPACA, CHAT, arguments, load, refused, stream, write

from tokentune.cli.arguments import parse_arguments
from tokentune.data import record_encoding
from tokentune.data.inspection.checks import look_at
from tokentune.data.inspection.preview import _data_table
from tokentune.data.instruction_data import InstructionData
from tokentune.data.labelled.encoding import RowReport, encode_texts, encode_words
from tokentune.data.labelled.labels import Labels
from tokentune.data.labelled.rows import Columns, Split, read_split, some_rows
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments

# ---- rows that are cut, dropped, repeated ----------------------------------------------------------------------------


def test_cut_rows_of_a_mixture_are_counted_as_often_as_they_come(tmp_path: Path) -> None:
    """Of weights 1 and 1, the smaller set's rows come twice; a set of weight 0 counts nowhere."""
    end_lost = {"prompt": "a", "completion": "b" * 30}
    cut = {"messages": [*CHAT, {"role": "user", "content": "x" * 90}]}
    names = [
        write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 5 + [{"prompt": "a", "completion": ""}]),
        write(tmp_path / "b.jsonl", [end_lost] * 2),
        write(tmp_path / "c.jsonl", [cut]),
        write(tmp_path / "d.jsonl", [end_lost, {"prompt": "a", "completion": ""}]),
    ]
    report = load(*names, words="--max_length 60 --dataset_weights 5 4 1 0").train_report
    assert (report.rows, report.records, report.dropped_rows) == (10, 9, 1)
    assert (report.cut_rows, report.cut_ends) == (1, 0)
    report = load(*names, words="--max_length 20 --dataset_weights 5 4 0 0").train_report
    assert (report.rows, report.records, report.cut_rows, report.cut_ends) == (9, 8, 4, 4)
    data = load(*names, words="--max_length 20")
    assert (data.train_report.rows, data.train_report.records, data.train_report.cut_ends) == (8, 11, 3)
    assert data.train.column_names == ["input_ids", "labels"]


def test_rows_of_context_alone_are_not_called_empty(tmp_path: Path) -> None:
    """Nothing of them is learnt, and no answer is empty."""
    context = [CHAT[0], CHAT[1] | {"weight": 0}]
    name = write(tmp_path / "a.jsonl", [{"messages": context}] * 3)
    assert "in any of 3 rows: every answer is empty or context only, or lies beyond" in refused(name)


def test_rows_that_end_in_another_special_token_have_no_end() -> None:
    """A special token within an answer (GPT-OSS: <|message|>) ends none."""
    tokenizer = chat_tokenizer(CHATML)
    special, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|im_end|>"])
    rows = [{"input_ids": [1, 20, special, 21, 22, 23], "labels": [-100, 20, special, 21, 22, 23]}] * 2
    rows.append({"input_ids": [1, 20, end], "labels": [-100, 20, end]})
    data = InstructionData(Dataset.from_list(rows), None, None, None)
    findings = look_at(data, tokenizer, arguments("x"), len(tokenizer))
    table = _data_table(findings, data, arguments("x"), tokenizer)
    (row,) = (n for n, name in enumerate(table.columns[0].cells) if name == "rows whose last answer has no end token")
    assert [*table.columns[1].cells][row] == "2 (66.7%)"


def test_of_a_stream_the_number_of_rows_that_were_looked_at_is_told(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    rows = stream(name)
    given = parse_arguments(
        ["--model_name_or_path", "m", "--dataset_name_or_path", name, "--streaming", "--max_steps", "9"]
    )
    tokenizer, data = chat_tokenizer(CHATML), InstructionData(rows, None, None, None)
    findings = look_at(data, tokenizer, given, len(tokenizer))
    assert findings.warnings
    assert all(text.endswith("(looked at: the first 1,000 rows of the stream)") for text in findings.warnings)
    assert _data_table(findings, data, given, tokenizer).columns[1].header == (
        "training: the first 1,000 rows of the stream"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_chats_whose_tools_are_left_out_are_counted(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_encoding, "CHUNKS_HERE", 1)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows = [{"messages": CHAT, "tools": tools if n % 2 else None} for n in range(300)]
    load(write(tmp_path / "a.jsonl", rows), words=f"--tokenize_workers {workers}")
    assert (
        "row 2: the chat template does not write the tools, which the model is not shown (and 149 more)" in caplog.text
    )


# ---- classify.py -----------------------------------------------------------------------------------------------------


def test_bad_rows_of_a_draw_are_the_draw_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lines that cannot be read are counted among all, rows without a label among those that were drawn."""
    lines = ["{"] * 12 + ['{"text": "sun", "label": "a"}'] * 4 + ['{"text": "sun"}'] * 4
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    words = f"--model_name_or_path m --dataset_name_or_path {tmp_path / 'a.jsonl'} --bad_rows"
    skip, stop = (
        read_split(parse_arguments([*words.split(), policy], ClassificationArguments), "train")
        for policy in ("skip", "stop")
    )
    drawn = some_rows(skip, 7)
    labels = Labels(("a",), {"a": 0})
    found = encode_texts(drawn, Columns(("text",), "label"), labels, tokenizer=tiny_tokenizer(), max_length=9)
    assert "12 of 20 rows are bad" in caplog.text and len(drawn.rows) == 7
    assert f"{7 - len(found.rows)} of 7 rows are bad" in caplog.text and len(found.rows) in (3, 4)
    assert len(some_rows(skip, 15).rows) == 8
    with pytest.raises(UserError, match="12 of 20 rows are bad"):
        some_rows(stop, 7)


def test_words_that_get_no_prediction_are_counted(tmp_path: Path) -> None:
    rows = [{"tokens": ["we", "saw", "suns", "again"]}, {"tokens": ["\u200b", "we"]}]
    split = Split(Dataset.from_list(rows), "data")
    found = encode_words(split, Columns(("tokens",), "tags"), None, tokenizer=tiny_tokenizer(), max_length=5)
    assert [row["word_positions"] for row in found.rows] == [[1, 2, 3, None], [None, 1]]
    assert str(found.report) == (
        "2 rows, 8 tokens; 1 rows cut at --max_length, 1 predictions lost; "
        "1 words without a token, as the tokenizer makes none of them"
    )


def test_what_is_not_counted_is_not_told() -> None:
    """Of images no tokens, of rows to predict no labels."""
    assert str(RowReport(rows=3, labels=3)) == "3 rows, 3 labels"
    assert str(RowReport(rows=3, tokens=9)) == "3 rows, 9 tokens"


# ---- the bar ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "csv"])
def test_a_terminal_shows_how_many_rows_are_tokenized(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of how many, where that is known before they are parsed."""
    table, path = Dataset.from_list(ALPACA), tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n" + "\n \n".join(map(json.dumps, ALPACA)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table.data.table, path)
    elif kind == "saved":
        table.save_to_disk(path)
    else:
        table.to_csv(path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    load(str(path))
    last = terminal.getvalue().split("\r")[-1].strip()
    assert last.startswith("Tokenizing: 100%|" if kind != "csv" else "Tokenizing: 40 rows [")
    assert ("40/40 [" in last) == (kind != "csv") and " rows/s]" in last
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    load(str(path))
    assert log.getvalue() == ""
