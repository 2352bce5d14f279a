"""Labelled rows: which data is read, which columns are taken, words aligned to sub-words, what is cut."""

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from classification_models import tiny_tokenizer, write_images, write_lines
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig, ByT5Tokenizer, ViTConfig

from tokentune.cli.arguments import parse_arguments
from tokentune.data.formats import records
from tokentune.data.labelled import encoding as classification_encoding
from tokentune.data.labelled.encoding import Encoded, RowReport, encode_texts, encode_words, true_labels
from tokentune.data.labelled.images import ImageRows
from tokentune.data.labelled.labels import Labels, find_labels, find_token_labels
from tokentune.data.labelled.rows import Columns, Split, find_columns, read_split, some_rows
from tokentune.data.labelled.splits import load_data, warn_of_one_label
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.glue import TASKS


def arguments(words: str) -> ClassificationArguments:
    return parse_arguments(["--model_name_or_path", "m", *words.split()], ClassificationArguments)


def split_of(rows: list[dict], **features: Any) -> Split:
    known = Dataset.from_list(rows, features=Features(features)) if features else Dataset.from_list(rows)
    return Split(known, "data")


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_glue_is_read_from_the_hub_by_name(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, config: str | None = None, *, split: str) -> Dataset:
        asked.append((name, config, split))
        return Dataset.from_list([{**dict.fromkeys(TASKS[task].columns, "x"), "label": 0, "idx": 0}])

    monkeypatch.setattr(records, "load_dataset", hub)
    for words in (f"--task_name {task}", f"--task_name {task} --dataset_name_or_path nyu-mll/glue"):
        asked.clear()
        given = arguments(f"{words} --test_dataset_name_or_path nyu-mll/glue")
        train, *_ = (read_split(given, split) for split in ("train", "validation", "test"))
        half = {"mnli": "_matched", "mnli_mismatched": "_mismatched"}.get(task, "")
        config = "mnli" if half else task
        names = ["train", f"validation{half}", f"test{half}"]
        assert asked == [("nyu-mll/glue", config, split) for split in names]
        assert find_columns(given, train) == Columns(TASKS[task].columns, "label")


def test_a_folder_s_own_validation_split_is_taken(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("validation", 2)):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": "x", "label": n} for n in range(count)])
    given = arguments(f"--dataset_name_or_path {tmp_path}")
    assert [len(read_split(given, split).rows) for split in ("train", "validation")] == [3, 2]
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(UserError, match="names no validation split"):
        read_split(given, "validation")


def test_splits_and_configurations_by_flag(tmp_path: Path) -> None:
    for config, splits in (("main", ("train_a", "train_b", "dev_x", "dev_y")), ("other", ("train_a",))):
        for count, split in enumerate(splits, start=1):
            (tmp_path / config).mkdir(exist_ok=True)
            write_lines(tmp_path / config / f"{split}.jsonl", [{"text": "x", "label": 0}] * count)
    words = f"--dataset_name_or_path {tmp_path} --dataset_config main"
    given = arguments(f"{words} --dataset_split train_b --eval_dataset_split dev_y")
    assert [len(read_split(given, split).rows) for split in ("train", "validation")] == [2, 4]
    with pytest.raises(UserError, match=r"several splits for train: train_a, train_b. Choose one with --dataset_split"):
        read_split(arguments(words), "train")
    with pytest.raises(UserError, match=r"splits for validation: dev_x, dev_y. Choose one with --eval_dataset_split"):
        read_split(arguments(words), "validation")
    given = arguments(f"{words} --test_dataset_name_or_path {tmp_path} --test_dataset_split train_a")
    assert len(read_split(given, "test").rows) == 1
    given = arguments(f"{words} --test_dataset_name_or_path {tmp_path}/other --test_dataset_config main")
    with pytest.raises(UserError, match="leave --test_dataset_config out"):
        read_split(given, "test")


def test_columns_that_are_not_read_break_nothing(tmp_path: Path) -> None:
    columns = {"text": ["we", "sun"], "label": [0, 1]}
    columns["created"] = pyarrow.array([4 * 10**15] * 2, pyarrow.timestamp("ms"))
    columns["id"] = pyarrow.array([bytes(16)] * 2, pyarrow.uuid())
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    given = arguments(f"--dataset_name_or_path {tmp_path / 'a.parquet'}")
    split = read_split(given, "train")
    found = find_columns(given, split)
    labels = find_labels(split.rows, found.label, split.where, task=None)
    encoded = encode_texts(split, found, labels, tokenizer=tiny_tokenizer(), max_length=9)
    assert found == Columns(("text",), "label") and encoded.report.rows == 2
    with pytest.raises(UserError, match="column 'created' cannot be read: "):
        find_labels(split.rows, "created", split.where, task=None)


def test_several_folders_of_images_for_one_split(tmp_path: Path) -> None:
    for split, count in (("train_a", 2), ("train_b", 4), ("test", 6)):
        write_images(tmp_path / split, count, seed=0)
    words = f"--task_type image --dataset_name_or_path {tmp_path}"
    with pytest.raises(UserError, match=r"several splits for train: train_a, train_b. Choose one with --dataset_split"):
        read_split(arguments(words), "train")
    assert len(read_split(arguments(f"{words} --dataset_split train_b"), "train").rows) == 4
    with pytest.raises(UserError, match="no split 'x', only test, train_a, train_b"):
        read_split(arguments(f"{words} --dataset_split x"), "train")


def test_images_are_read_by_split(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        write_images(tmp_path / "bars" / split, count, seed=0)
    given = arguments(f"--task_type image --dataset_name_or_path {tmp_path / 'bars'}")
    train = read_split(given, "train").rows
    assert len(train) == 6 and train.features["label"].names == ["column", "row"]
    whole = write_images(tmp_path / "flat", 4, seed=0)
    given = arguments(f"--task_type image --dataset_name_or_path x --eval_dataset_name_or_path {whole}")
    assert len(read_split(given, "validation").rows) == 4
    given = arguments(f"--task_type image --dataset_name_or_path x --eval_dataset_name_or_path {tmp_path / 'bars'}")
    with pytest.raises(UserError, match="no split 'validation', only"):
        read_split(given, "validation")


def test_a_csv_file_s_text_may_look_like_a_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\n42,0\nNA,1\n", encoding="utf-8")
    given = arguments(f"--task_name cola --dataset_name_or_path {path}")
    assert read_split(given, "train").rows["sentence"][:] == ["42", "NA"]


def test_some_rows_are_the_same_for_every_seed() -> None:
    split = split_of([{"n": n} for n in range(50)])
    some = some_rows(split, 10)
    chosen = some.rows["n"][:]
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) and chosen != list(range(10))
    assert some_rows(split, 10).rows["n"][:] == chosen
    assert some.place(3) == f"data, row {chosen[3] + 1}"  # where it stands in the file
    assert len(some_rows(split, 60).rows) == 50


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "inputs"),
    [
        ({"title": "a", "label": 0}, ("title",)),
        ({"question": "a", "sentence": "b", "source": "c", "label": 0}, ("question", "sentence")),
        ({"sentence": "a", "source": "c", "label": 0}, ("sentence",)),
        ({"head": "a", "size": 3, "body": "b", "label": "x"}, ("head", "body")),
    ],
)
def test_columns_of_texts_are_found(row: dict, inputs: tuple[str, ...]) -> None:
    assert find_columns(arguments("--dataset_name_or_path x"), split_of([row])) == Columns(inputs, "label")


def test_columns_of_words_are_found() -> None:
    split = split_of([{"id": "1", "tokens": ["a"], "pos_tags": ["X"], "ner_tags": ["O"]}])
    found = find_columns(arguments("--dataset_name_or_path x --task_type token"), split)
    assert found == Columns(("tokens",), "ner_tags")


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_numbered_in_their_order() -> None:
    labels = find_labels(split_of([{"label": n} for n in (7, 3, 7)]).rows, "label", "data", task=None)
    assert labels.names == ("3", "7") and labels.encode(7, "row") == 1 and labels.outputs == 2
    labels = find_labels(split_of([{"label": n} for n in (True, False)]).rows, "label", "data", task=None)
    assert labels.names == ("False", "True")
    labels = find_labels(split_of([{"label": n} for n in (0.5, 1.0)]).rows, "label", "data", task=None)
    assert labels.is_regression and labels.outputs == 1 and labels.encode(2.5, "row") == 2.5


def test_named_classes_keep_their_numbers_and_names() -> None:
    split = split_of([{"label": n} for n in (2, 0)], label=ClassLabel(names=["a", "b", "c"]))
    labels = find_labels(split.rows, "label", "data", task=None)
    assert labels.names == ("a", "b", "c") and labels.encode(2, "row") == 2
    with pytest.raises(UserError, match="label -1 is not among"):
        labels.encode(-1, "row")
    words = split_of([{"tags": [0, 1]}], tags=List(ClassLabel(names=["O", "B-x"])))
    labels = find_token_labels(words.rows, "tags", "data")
    assert labels.names == ("O", "B-x") and labels.outside == 0


def test_labels_of_a_glue_task_may_be_its_names() -> None:
    rows = split_of([{"label": name} for name in ("not_entailment", "entailment")]).rows
    labels = find_labels(rows, "label", "data", task=TASKS["rte"])
    assert labels.encode("not_entailment", "row") == 1


def test_classes_of_a_folder_that_lacks_one_keep_their_names(tmp_path: Path) -> None:
    """Folders number the classes that they have: "row", alone in its split, is number 0 there and 1 in training."""
    for split in ("train", "validation", "test"):
        write_images(tmp_path / split, 4, seed=0)
    for split in ("validation", "test"):
        shutil.rmtree(tmp_path / split / "column")
    given = arguments(f"--task_type image --dataset_name_or_path {tmp_path} --test_dataset_name_or_path {tmp_path}")
    data = load_data(given, ViTConfig(), None)
    assert data.labels.names == ("column", "row")
    assert sorted(data.train.rows.numbers) == [0, 0, 1, 1]
    assert data.validation.rows.numbers == data.test.truth == [1, 1]


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        (["x", "y"], [0, 1], ""),
        ([-1, -1], None, ""),  # hidden, as GLUE's
        ([None, None], None, ""),
        (["y", None], None, "row 2: 'label' is missing; every row needs a label. The predictions get no score."),
        (["y", "z"], None, "row 2: label 'z' is not among the training data's: 'x', 'y'. The predictions get no"),
    ],
)
def test_labels_of_rows_to_predict(given: list, expected: list | None, said: str, caplog: Any) -> None:
    split = split_of([{"text": "a", "label": label} for label in given])
    labels = Labels(("x", "y"), {"x": 0, "y": 1})
    assert true_labels(split, Columns(("text",), "label"), labels, of_words=False) == expected
    assert said in caplog.text and bool(said) == bool(caplog.text)
    assert true_labels(split, Columns(("text",), "other"), labels, of_words=False) is None


def test_labels_of_words_to_predict() -> None:
    split = split_of([{"tokens": ["a", "b"], "tags": ["O", "B-x"]}, {"tokens": ["c"], "tags": ["O"]}])
    columns = Columns(("tokens",), "tags")
    assert true_labels(split, columns, WORDS, of_words=True) == [[0, 1], [0]]
    split = split_of([{"tokens": ["a", "b"], "tags": ["O"]}])
    assert true_labels(split, columns, WORDS, of_words=True) is None  # one label for two words


# ---- rows ------------------------------------------------------------------------------------------------------------

WORDS = Labels(("O", "B-x"), {"O": 0, "B-x": 1})


def test_the_first_sub_word_carries_the_word_s_label() -> None:
    """[CLS] we wait ... : "wait" is no word of the vocabulary and falls into letters, "suns" into two pieces."""
    tokenizer = tiny_tokenizer()
    split = split_of([{"tokens": ["we", "wait", "suns", "again"], "tags": ["O", "B-x", "B-x", "O"]}])
    encoded = encode_words(split, Columns(("tokens",), "tags"), WORDS, tokenizer=tokenizer, max_length=32)
    (row,) = encoded.rows
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "we", "w", "##a", "##i", "##t", "sun", "##s", "again", "[SEP]"]
    assert row["labels"] == [-100, 0, 1, -100, -100, -100, 1, -100, 0, -100]
    assert encoded.report.labels == 4 and encoded.report.cut_labels == 0


def test_labels_behind_the_cut_are_counted() -> None:
    split = split_of([{"tokens": ["we", "saw", "suns", "again"], "tags": ["O", "B-x", "B-x", "O"]}] * 2)
    columns = Columns(("tokens",), "tags")
    encoded = encode_words(split, columns, WORDS, tokenizer=tiny_tokenizer(), max_length=5)
    assert [row["labels"] for row in encoded.rows] == [[-100, 0, 1, 1, -100]] * 2
    assert (encoded.report.cut_rows, encoded.report.labels, encoded.report.cut_labels) == (2, 6, 2)
    assert "2 rows cut at --max_length, 2 labels lost" in str(encoded.report)
    unlabelled = encode_words(split, columns, None, tokenizer=tiny_tokenizer(), max_length=5)
    assert unlabelled.rows[0]["word_positions"] == [1, 2, 3, None]


@pytest.mark.parametrize(("max_length", "cut"), [(32, 0), (4, 1)])
def test_words_without_a_token_are_not_counted_as_cut(max_length: int, cut: int) -> None:
    nothing = ["\u200b", "\x00", " "]
    split = split_of([{"tokens": ["we", *nothing, "saw", "again"], "tags": ["O"] * 6}])
    encoded = encode_words(
        split, Columns(("tokens",), "tags"), WORDS, tokenizer=tiny_tokenizer(), max_length=max_length
    )
    report = encoded.report
    assert (report.cut_rows, report.cut_labels, report.unwritten_labels) == (cut, cut, 3)
    assert report.labels == 3 - cut
    assert "3 words without a token" in str(report)


def test_pairs_are_cut_at_the_longer_text() -> None:
    split = split_of([{"a": "the sun " * 9, "b": "we saw", "label": "x"}, {"a": "sun", "b": "", "label": "y"}])
    labels = Labels(("x", "y"), {"x": 0, "y": 1})
    columns = Columns(("a", "b"), "label")
    tokenizer = tiny_tokenizer()
    encoded = encode_texts(split, columns, labels, tokenizer=tokenizer, max_length=10)
    first = tokenizer.convert_ids_to_tokens(encoded.rows[0]["input_ids"])
    assert len(first) == 10 and first[-4:] == ["[SEP]", "we", "saw", "[SEP]"]
    assert encoded.rows[0]["token_type_ids"] == [0] * 7 + [1] * 3
    assert [row["labels"] for row in encoded.rows] == [0, 1]
    assert (encoded.report.rows, encoded.report.cut_rows) == (2, 1)


@pytest.mark.parametrize("kind", ["texts", "pairs", "words"])
def test_each_row_is_tokenized_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are cut are counted all the same, also one that loses a part of its last word alone."""
    monkeypatch.setattr(classification_encoding, "ROWS_AT_ONCE", 2)
    long, short = ("the sun " * 5).split(), ["sun"]
    tokenizer, seen = tiny_tokenizer(), []

    def counted(*texts: list, **options: object) -> object:
        seen.extend(zip(*texts, strict=True))
        return tokenizer(*texts, **options)

    counted.is_fast = True
    if kind == "words":
        split = split_of([{"tokens": words, "tags": ["O"] * len(words)} for words in (long, short, ["we", "wait"])])
        report = encode_words(split, Columns(("tokens",), "tags"), WORDS, tokenizer=counted, max_length=5).report
    else:
        texts = [" ".join(words) for words in (long, short, ["we", "wait"])]
        split = split_of([{"a": text, "b": "we" if kind == "pairs" else "", "label": "x"} for text in texts])
        columns = Columns(("a", "b") if kind == "pairs" else ("a",), "label")
        report = encode_texts(split, columns, Labels(("x",), {"x": 0}), tokenizer=counted, max_length=5).report
    assert (report.rows, report.cut_rows, len(seen)) == (3, 2, 3)


@pytest.mark.parametrize("pairs", [False, True])
def test_python_tokenizers_tokenize_a_row_that_fits_once(pairs: bool) -> None:
    """ByT5's: a token for each byte, and one for the end."""
    tokenizer, seen = ByT5Tokenizer(extra_ids=0), []
    tokenize = tokenizer._tokenize
    tokenizer._tokenize = lambda text, **options: seen.append(text) or tokenize(text, **options)
    texts = [("abcd", "efg"), ("a", "b"), ("abcdefgh", "")]
    split = split_of([{"a": first, "b": second, "label": "x"} for first, second in texts])
    columns, labels = Columns(("a", "b") if pairs else ("a",), "label"), Labels(("x",), {"x": 0})
    encoded = encode_texts(split, columns, labels, tokenizer=tokenizer, max_length=8)
    again = {"abcd", "efg", "abcdefgh"} if pairs else {"abcdefgh"}
    assert Counter(seen) == Counter([text for pair in texts for text in pair[: 1 + pairs] if text] + [*again])
    assert (encoded.report.rows, encoded.report.cut_rows) == (3, len(again) - pairs)
    columns = [[text for text, *_ in texts], *([[text for _, text in texts]] if pairs else [])]
    expected = tokenizer(*columns, truncation=True, max_length=8)
    for row, item in enumerate(encoded.rows):
        assert item == {name: values[row] for name, values in expected.items()} | {"labels": 0}


def test_values_are_looked_at_as_texts() -> None:
    split = split_of([{"text": 3, "label": 0}], text=Value("int64"), label=Value("int64"))
    with pytest.raises(UserError, match="row 1: 'text' is 3, not text"):
        encode_texts(split, Columns(("text",), "label"), None, tokenizer=tiny_tokenizer(), max_length=10)


@pytest.mark.parametrize("kind", ["text", "token"])
def test_rows_of_one_label_are_told(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The training data has two; validation data that is sorted by its labels has one."""
    name, value = ("text", "a b") if kind == "text" else ("tokens", ["a", "b"])
    rows = [{name: value, "label": label if kind == "text" else ["O", label]} for label in ("O", "X", "O")]
    train, validation = (write_lines(tmp_path / f"{n}.jsonl", rows[::n]) for n in (1, 2))
    names = f"--dataset_name_or_path {train} --eval_dataset_name_or_path {validation} --max_length 16"
    with caplog.at_level(logging.WARNING, logger="tokentune"):
        load_data(arguments(f"{names} --task_type {kind}"), BertConfig(), tiny_tokenizer())
    count = {"text": 2, "token": 4}[kind]
    told = f"--eval_dataset_name_or_path {validation}: all {count} labels are the same: they tell nothing from another"
    assert [record.getMessage() for record in caplog.records if "the same" in record.getMessage()] == [told]


@pytest.mark.parametrize(("numbers", "told"), [([3, 3], True), ([3], False), ([0, 3], False), ([0.5, 0.5], True)])
def test_images_of_one_label_are_told(numbers: list[float], told: bool, caplog: pytest.LogCaptureFixture) -> None:
    rows = ImageRows([None] * len(numbers), numbers, None, 1, "data")
    with caplog.at_level(logging.WARNING, logger="tokentune"):
        warn_of_one_label(Encoded(rows, RowReport(labels=len(numbers))), "data")
    assert ("labels are the same" in caplog.text) == told
