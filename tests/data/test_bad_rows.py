"""Rows that cannot be used: all are counted, five are named, and with `--bad_rows skip` the others are trained on."""

import json
import logging
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, chat_tokenizer
from classification_models import tiny_tokenizer, write_lines
from instruction_rows import CHAT, answers, load, refused, stream, texts, write

from tokentune.cli.arguments import parse_arguments
from tokentune.data.formats.bad_rows import BadRows
from tokentune.data.labelled.encoding import encode_texts, encode_words
from tokentune.data.labelled.labels import Labels, find_labels
from tokentune.data.labelled.rows import Columns, find_columns, read_split
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments

GOOD = {"instruction": "a", "output": "ok"}
WRONG_TURN = {"messages": [{"role": "narrator", "content": "x"}, CHAT[1]]}


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Nine rows: six are bad, for reasons that the reader, the format and the text tell."""
    bad = ["{", "[1]", {"instruction": "a"}, {"instruction": 5, "output": "b"}, GOOD | {"output": "\ud800"}]
    return lines(tmp_path / "a.jsonl", GOOD, *bad, GOOD, GOOD | {"history": "x"}, GOOD)


def test_all_bad_rows_are_counted_and_the_first_five_named(mixed: str) -> None:
    message = refused(mixed, words="--data_format alpaca")
    first, cure = message.split("\n")
    assert first.startswith(f"{mixed}: 6 of 9 rows are bad, the first 5: line 2: not valid JSON")
    for part in ("line 3: expected an object", "row 4: 'output' is missing", "row 5: 'instruction' is 5", "row 6: "):
        assert f"; {part}" in first
    assert "row 8" not in first
    assert cure == "Repair them, or leave them out with --bad_rows skip."


def test_bad_rows_are_left_out(mixed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = f"--data_format alpaca --bad_rows skip --data_cache {tmp_path / 'cache'}"
    for _ in range(2):  # also where the tokens are kept already
        with caplog.at_level(logging.WARNING):
            data = load(mixed, words=words)
        assert answers(data) == [["ok"]] * 3 and data.sources[0].bad == 6
        assert "6 of 9 rows are bad" in caplog.text and "--bad_rows skip: they are left out" in caplog.text
        caplog.clear()
    assert "6 of 9 rows are bad" in refused(mixed, words=f"--data_format alpaca --data_cache {tmp_path / 'cache'}")


def test_the_chat_template_s_refusals_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    long = {"messages": CHAT * 2}
    name = write(tmp_path / "a.jsonl", [{"messages": CHAT}, long, WRONG_TURN, long])
    message = refused(name, tokenizer=chat_tokenizer(template))
    assert message.startswith(f"{name}: 3 of 4 rows are bad: row 2: ") and "row 3, message 1: unknown role" in message
    assert answers(load(name, words="--bad_rows skip", tokenizer=chat_tokenizer(template))) == [["ok<|im_end|>"]]


def test_what_is_wrong_with_all_rows_is_said_once(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)
    assert "no chat template" in refused(name, words="--bad_rows skip", tokenizer=chat_tokenizer(None))
    message = refused(write(tmp_path / "b.jsonl", [WRONG_TURN] * 2), words="--bad_rows skip")
    assert "2 of 2 rows are bad" in message and message.endswith("Repair them.")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text\nx\na,b\ny\nc,d\n"), ("a.json", '[{"text": "x"}, 1, 2]')]
)
def test_rows_of_other_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert "2 of " in refused(str(tmp_path / name))
    assert answers(load(str(tmp_path / name), words="--bad_rows skip"))[0] == ["x"]


def test_one_bad_row_is_told_alone(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [GOOD, {"instruction": "a"}])
    assert refused(name) == f"{name}, row 2: 'output' is missing."


def test_a_stream_leaves_bad_rows_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": 5}, "{", {"text": "y"})
    with caplog.at_level(logging.WARNING):
        assert set(texts(stream(name, words="--bad_rows skip"), 12)) == {"x", "y"}
    assert "row 2: 'text' is 5, not text" in caplog.text and "line 3: not valid JSON" in caplog.text
    with pytest.raises(UserError, match=r"row 2|line 3"):
        texts(stream(name), 12)


# ---- classify.py -----------------------------------------------------------------------------------------------------


def arguments(words: str) -> ClassificationArguments:
    return parse_arguments(["--model_name_or_path", "m", *words.split()], ClassificationArguments)


def test_labelled_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line that is no JSON, a label that is missing, one that is none, a text that is missing, one that is empty."""
    good = [{"text": "sun", "label": "a"}, {"text": "we", "label": "b"}]
    bad = ["{", {"text": "sun"}, {"text": "we", "label": ["a"]}, {"label": "a"}, {"text": " ", "label": "a"}]
    name = lines(tmp_path / "rows.jsonl", good[0], *bad, good[1])
    for policy in ("stop", "skip"):
        given = arguments(f"--dataset_name_or_path {name} --bad_rows {policy}")
        split = read_split(given, "train")
        labels = find_labels(split.rows, "label", split.where, task=None)
        assert labels.names == ("a", "b")
        columns = find_columns(given, split)
        if policy == "stop":
            with pytest.raises(UserError, match=r"5 of 7 rows are bad: .*line 2: .*row 3: .*row 4: .*row 5: .*row 6: "):
                encode_texts(split, columns, labels, tokenizer=tiny_tokenizer(), max_length=9)
        else:
            encoded = encode_texts(split, columns, labels, tokenizer=tiny_tokenizer(), max_length=9)
            assert [row["labels"] for row in encoded.rows] == [0, 1] and encoded.report.rows == 2
    assert "5 of 7 rows are bad" in caplog.text


def test_words_and_a_label_of_no_kind(tmp_path: Path) -> None:
    rows = [{"tokens": ["we"], "tags": ["O"]}, {"tokens": ["we"], "tags": [["O"]]}, {"tokens": [], "tags": []}]
    name = write_lines(tmp_path / "rows.jsonl", rows)
    labels = Labels(("O", "B"), {"O": 0, "B": 1})
    for policy in ("stop", "skip"):
        split = read_split(arguments(f"--task_type token --dataset_name_or_path {name} --bad_rows {policy}"), "train")
        if policy == "stop":
            with pytest.raises(UserError, match=r"2 of 3 rows are bad: row 2, word 1: .*; row 3: 'tokens' is empty"):
                encode_words(split, Columns(("tokens",), "tags"), labels, tokenizer=tiny_tokenizer(), max_length=9)
        else:
            columns = Columns(("tokens",), "tags")
            assert len(encode_words(split, columns, labels, tokenizer=tiny_tokenizer(), max_length=9).rows) == 1


def test_every_row_to_be_predicted_is_needed(tmp_path: Path) -> None:
    """One that is left out would shift all predictions behind it."""
    name = write_lines(tmp_path / "rows.jsonl", [{"text": "sun"}, {"text": None}, {"text": " "}])
    split = read_split(
        arguments(f"--dataset_name_or_path x --test_dataset_name_or_path {name} --bad_rows skip"), "test"
    )
    with pytest.raises(UserError, match=r"2 of 3 rows are bad: row 2: .*\nRepair them.$"):
        encode_texts(split, Columns(("text",), "label"), None, tokenizer=tiny_tokenizer(), max_length=9)


def test_an_error_of_another_place_is_no_row_s() -> None:
    bad = BadRows("skip")
    with pytest.raises(UserError, match="the tokenizer"), bad.catch("f, row 1"):
        raise UserError("the tokenizer is broken")
    with bad.catch("f, row 2"):
        raise UserError("f, row 2, message 3: no text")
    assert bad.count == 1
