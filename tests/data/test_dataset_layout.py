"""Which files of a folder are read: splits, configurations, saved data sets, compressed shards, and what is named."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from tokentune.data.formats.dataset_layout import find_files, tells_split
from tokentune.data.formats.records import load_records, open_source
from tokentune.errors import UserError

FLAG = "--dataset_name_or_path"


def put(folder: Path, *names: str) -> Path:
    """Files of one row, which says where it stands; of other kinds, a word."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = [{"instruction": "x", "output": name}]
        if name.endswith(".parquet"):
            Dataset.from_list(row).to_parquet(folder / name)
        elif name.endswith(".jsonl"):
            (folder / name).write_text(json.dumps(row[0]) + "\n")
        else:
            (folder / name).write_text("x")
    return folder


def found(folder: Path, role: str = "train", **asked: str) -> list[str]:
    return [str(f.relative_to(folder)) for f in find_files(folder, FLAG, role=role, **asked)]


def refused(folder: Path, role: str = "train", **asked: str) -> str:
    with pytest.raises(UserError) as error:
        find_files(folder, FLAG, role=role, **asked)
    assert str(error.value).startswith(f"{FLAG} {folder}: ") and "\n" not in str(error.value)
    return str(error.value)


def shard(name: str, number: int = 0, of: int = 1) -> str:
    return f"{name}-{number:05}-of-{of:05}.parquet"


# ---- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        [f"data/{shard(name)}" for name in ("test_sft", "train_gen", "train_sft")],
        ["test_sft.jsonl", "train_gen.jsonl", "train_sft.jsonl"],
        ["test_sft/a.jsonl", "train_gen/a.jsonl", "train_sft/a.jsonl"],
        ["chats.test_sft.jsonl", "chats.train_gen.jsonl", "chats.train_sft.jsonl"],
    ],
)
def test_several_splits_for_training(names: list[str], tmp_path: Path) -> None:
    """As in HuggingFaceH4/ultrachat_200k."""
    put(tmp_path, *names)
    message = refused(tmp_path)
    assert "several splits for train: train_gen, train_sft. Choose one with --dataset_split" in message
    assert found(tmp_path, split="train_sft") == [names[2]]
    assert found(tmp_path, "validation", split="test_sft") == [names[0]]
    assert "no split 'train_dpo', only test_sft, train_gen, train_sft" in refused(tmp_path, split="train_dpo")
    assert "no split 'validation'" in (message := refused(tmp_path, "validation"))
    assert "--eval_dataset_split" in message


def test_parts_of_one_split_belong_together(tmp_path: Path) -> None:
    parts = (
        [f"data/{shard('train', 0, 2)}", f"data/{shard('train', 1, 2)}"],
        ["train_1.jsonl", "train_2.jsonl"],
        ["train-part-01.jsonl", "train-part-02.jsonl"],
        ["train/a.jsonl", "train/b.jsonl"],
        ["a.train.jsonl", "b.train.jsonl"],  # two files of one split, as two files of none
        ["2023-01/a.jsonl", "2023-02/a.jsonl"],
    )
    for number, names in enumerate(parts):
        assert found(put(tmp_path / str(number), *names)) == names


def test_the_split_of_the_very_name_is_meant(tmp_path: Path) -> None:
    put(tmp_path, "plain_text/" + shard("train"), "plain_text/" + shard("unsupervised"), "plain_text/" + shard("test"))
    assert found(tmp_path) == ["plain_text/" + shard("train")]
    assert found(tmp_path, split="unsupervised") == ["plain_text/" + shard("unsupervised")]  # as in stanfordnlp/imdb
    put(tmp_path / "more", "train.jsonl", "train_extra.jsonl")
    assert found(tmp_path / "more") == ["train.jsonl"]


def test_two_kinds_of_file_of_one_name(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", "train.csv", "test.csv")
    assert "'train.csv', 'train.jsonl' have one name, and may hold the same rows twice" in refused(tmp_path)
    assert found(tmp_path, "test") == ["test.csv"]
    put(tmp_path / "b", f"data/{shard('train')}", "train.jsonl")
    assert "may hold the same rows twice" in refused(tmp_path / "b")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([shard("train"), shard("train", 0, 2), shard("train", 1, 2)], "the files of 'train' are numbered as those of"),
        (
            ["train-00000-of-00001-ab.parquet", "train-00000-of-00001-cd.parquet"],
            "several sets, which may hold the same",
        ),
        (["train (1).jsonl", "train.jsonl"], "'train (1).jsonl', 'train.jsonl' have one name, and may hold the same"),
        (["old/rows.jsonl", "rows.jsonl"], "several configurations: (the folder itself), old."),
        (["train_v1.jsonl", "train_v2.jsonl"], "several splits for train: train_v1, train_v2."),
    ],
)
def test_other_states_of_one_set_are_not_joined(names: list[str], told: str, tmp_path: Path) -> None:
    assert told in refused(put(tmp_path, *names))


def test_splits_by_other_words(tmp_path: Path) -> None:
    put(tmp_path, "devset.jsonl", "heldout.jsonl", "trainset (1).jsonl", "trainset (2).jsonl")
    assert found(tmp_path) == ["trainset (1).jsonl", "trainset (2).jsonl"]
    assert found(tmp_path, "validation") == ["devset.jsonl"] and found(tmp_path, "test") == ["heldout.jsonl"]


def test_files_of_the_same_content_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.jsonl", "b.jsonl")
    assert len(found(tmp_path)) == 2 and "the same content" not in caplog.text  # of the same size
    (tmp_path / "rows_old.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "b.jsonl")
    assert len(found(tmp_path)) == 4
    assert "'a.jsonl', 'rows_old.jsonl' have the same content, so that their rows come twice" in caplog.text
    assert "'b.jsonl', 'c.jsonl' have the same content" in caplog.text


def test_what_tells_no_split_cannot_be_chosen_from(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "b.jsonl")
    assert found(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert "leave --dataset_split out" in refused(tmp_path, split="test")
    assert "leave --dataset_config out" in refused(tmp_path, config="main")
    for asked in ({"split": "test"}, {"config": "main"}):
        with pytest.raises(UserError, match="is a single file, which is read whole: leave --dataset_"):
            open_source(str(tmp_path / "a.jsonl"), flag=FLAG, **asked)


# ---- configurations --------------------------------------------------------------------------------------------------

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# Grade school maths
"""


@pytest.mark.parametrize("card", [False, True])
def test_several_configurations(card: bool, tmp_path: Path) -> None:
    """As in openai/gsm8k, with its README and without."""
    put(tmp_path, f"main/{shard('train')}", f"main/{shard('test')}", f"socratic/{shard('train')}")
    if card:
        (tmp_path / "README.md").write_text(CARD)
    message = refused(tmp_path)
    assert "several configurations: main, socratic. Choose one with --dataset_config" in message
    assert found(tmp_path, config="socratic") == [f"socratic/{shard('train')}"]
    assert found(tmp_path, "validation", config="main", split="test") == [f"main/{shard('test')}"]
    assert found(tmp_path, "test") == [f"main/{shard('test')}"]  # the only ones
    assert "no configuration 'other', only main, socratic" in refused(tmp_path, config="other")


def test_a_readme_s_default_and_what_it_joins(tmp_path: Path) -> None:
    put(tmp_path, "en/a.jsonl", "de/b.jsonl", "old/c.jsonl")
    assert "several configurations: de, en, old" in refused(tmp_path)
    head = "---\nconfigs:\n- config_name: all\n  default: true\n  data_files:\n  - en/*.jsonl\n  - de/*.jsonl\n"
    (tmp_path / "README.md").write_text(f"{head}- config_name: old\n  data_files: old/c.jsonl\n---\n")
    assert found(tmp_path) == ["en/a.jsonl", "de/b.jsonl"]
    assert found(tmp_path, config="old") == ["old/c.jsonl"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("  data_files: a.csv\n  sep: ';'\n", "reads the configuration 'x' with 'sep'"),
        ("  data_files: hf://datasets/a/b/c.csv\n", "names a file elsewhere"),
        ("  data_files:\n  - split: 5\n", "the configs in its README.md cannot be read"),
        ("  data_files: [\n", "the configs in its README.md cannot be read"),
        ("  data_files: a.csv\n- config_name: x\n", "the configs in its README.md cannot be told apart: the name 'x'"),
        (
            "  data_files:\n  - {split: train, path: a.csv}\n  - {split: train, path: deep}\n",
            "the data_files in its README.md cannot be read: Some splits are duplicated",
        ),
        ("  data_files: b-*.csv\n", "its README.md names data that is not there: 'b-*.csv'. Copy or download it"),
        ("  data_files:\n  - a.csv\n  - b.csv\n", "its README.md names data that is not there: 'b.csv'"),
        ("  data_dir: below\n", "its README.md names data that is not there: 'below/*'"),
        ("  data_dir: deep\n", "from deep, which holds folders of 'de', 'en'. Give one of them"),
    ],
)
def test_a_readme_that_asks_for_more(config: str, told: str, tmp_path: Path) -> None:
    put(tmp_path, "a.csv", "deep/de/a.csv", "deep/en/a.csv")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n{config}---\n")
    assert told in refused(tmp_path)


def test_a_copy_of_some_of_what_a_readme_names(tmp_path: Path) -> None:
    """What is missing is named where it is asked for, and otherwise chosen by nobody."""
    put(tmp_path, f"main/{shard('train')}")
    (tmp_path / "README.md").write_text(CARD)
    assert found(tmp_path) == [f"main/{shard('train')}"]
    told = "its README.md names data that is not there: "
    assert f"{told}'main/test-*'. Copy or download it" in refused(tmp_path, "test")
    assert f"{told}'socratic/train-*'" in refused(tmp_path, config="socratic")
    assert "no split 'validation', only train, test" in refused(tmp_path, "validation")
    assert tells_split(str(tmp_path), "test")  # so that it is the missing file that is spoken of
    put(tmp_path / "b", "train_sft.jsonl")
    splits = "".join(f"  - split: train_{name}\n    path: train_{name}.jsonl\n" for name in ("gen", "sft"))
    (tmp_path / "b" / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files:\n{splits}---\n")
    assert found(tmp_path / "b") == ["train_sft.jsonl"]
    assert f"{told}'train_gen.jsonl'" in refused(tmp_path / "b", split="train_gen")


def test_missing_shards_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, f"data/{shard('train', 1, 3)}", f"data/{shard('train', 2, 3)}", f"data/{shard('test')}")
    with caplog.at_level(logging.WARNING):
        assert len(found(tmp_path)) == 2 and len(found(tmp_path, "test")) == 1
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "only 2 of the 3 files of 'train' are there"
    ]


def test_a_readme_that_says_nothing_of_files(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl")
    for text in ("---\nlicense: mit\n---\n", "---\nlicense: [\n---\n", "# configs: none\n", "", "\xff"):
        (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
        assert found(tmp_path) == ["a.jsonl"]


# ---- saved data sets -------------------------------------------------------------------------------------------------


def test_saved_data_sets_with_splits_of_any_name(tmp_path: Path) -> None:
    rows = {name: Dataset.from_list([{"output": name}]) for name in ("train_sft", "train_gen", "test")}
    DatasetDict(rows).save_to_disk(tmp_path / "all")
    assert "several splits for train: train_gen, train_sft" in refused(tmp_path / "all")
    assert load_records(str(tmp_path / "all"), split="train_gen").to_list() == [{"output": "train_gen"}]
    DatasetDict({"train": rows["train_sft"]}).save_to_disk(tmp_path / "several" / "main")
    DatasetDict({"train": rows["train_gen"]}).save_to_disk(tmp_path / "several" / "socratic")
    assert "several configurations: main, socratic" in refused(tmp_path / "several")
    assert load_records(str(tmp_path / "several"), config="main").to_list() == [{"output": "train_sft"}]


def test_saved_splits_that_are_missing(tmp_path: Path) -> None:
    rows = {name: Dataset.from_list([{"output": name}]) for name in ("train", "test")}
    DatasetDict(rows).save_to_disk(tmp_path)
    (tmp_path / "train" / "state.json").unlink()
    told = "its dataset_dict.json names a saved split that is not there: 'train'. Copy or download it, or correct"
    assert told in refused(tmp_path)
    shutil.rmtree(tmp_path / "train")
    assert told in refused(tmp_path)
    assert load_records(str(tmp_path), role="test").to_list() == [{"output": "test"}]
    (file,) = (tmp_path / "test").glob("*.arrow")
    file.unlink()
    with pytest.raises(UserError) as error:
        load_records(str(tmp_path), role="test")
    assert str(error.value) == (
        f"{FLAG} {tmp_path / 'test'}: its state.json names data that is not there: {file.name!r}. Copy or download it, "
        "or save the data set again."
    )


def test_saved_data_sets_side_by_side(tmp_path: Path) -> None:
    """Their `state.json` is no row."""
    for name in ("train", "validation"):
        Dataset.from_list([{"output": name}]).save_to_disk(tmp_path / name)
    for role in ("train", "validation"):
        assert load_records(str(tmp_path), role=role).to_list() == [{"output": role}]


# ---- what is not read ------------------------------------------------------------------------------------------------


def test_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train.jsonl", "test.jsonl", "train_2.jsonl.xz", "rows.arrow", "notes.txt", "README.md", "LICENSE")
    put(tmp_path, ".cache/a.jsonl", "build.py")
    with caplog.at_level(logging.INFO):
        assert found(tmp_path) == ["train.jsonl"]
    by_level = {record.levelname: record.getMessage() for record in caplog.records}
    assert "not read: 'notes.txt', 'rows.arrow', 'train_2.jsonl.xz' (what is read: .json" in by_level["WARNING"]
    assert "of other splits or configurations: 'test.jsonl'" in by_level["INFO"]


def test_which_splits_are_told(tmp_path: Path) -> None:
    put(tmp_path / "a", "train/cat/1.png", "val/cat/1.png")
    put(tmp_path / "b", "rows.jsonl")
    assert tells_split(str(tmp_path / "a"), "validation") and not tells_split(str(tmp_path / "a"), "test")
    assert not tells_split(str(tmp_path / "b"), "train") and not tells_split(str(tmp_path / "b/rows.jsonl"), "train")
    assert not tells_split("owner/data", "validation")
